"""Image encoders: networks, their weights and preprocessing."""
