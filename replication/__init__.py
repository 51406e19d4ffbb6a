"""What makes bytes survive a lost host: placement, holders, transfer, checksums.

This package moves opaque, checksummed bytes. It knows nothing of tensors, steps to keep, or S3;
`tiered` does, and imports this package, never the reverse.
"""
