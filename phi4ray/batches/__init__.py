"""OpenAI's Batch API: files and batches in an object store, and the runner that answers them."""
