"""`stepwell demo`: a small GPT, trained on Python's own source text by two workers and two shards."""
