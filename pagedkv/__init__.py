"""KV-cache memory manager and continuous-batching scheduler that inference engines embed."""
