"""A job as the first release stored it on S3: bytes that every later one must read."""
