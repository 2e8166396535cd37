"""Reports a measurement and whether it meets its bar, the required value."""

__all__ = ["report"]


def report(name: str, value: float, bar: float, at_least: bool = True) -> bool:
    """Prints `NAME VALUE BAR ok|short` and returns whether the bar is met."""
    met = value >= bar if at_least else value <= bar
    print(f"{name} {value:.3f} {'>=' if at_least else '<='}{bar:g} {'ok' if met else 'short'}", flush=True)
    return met
