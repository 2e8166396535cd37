"""Caption decoding: beam search, sampling, constraints and reranking."""
