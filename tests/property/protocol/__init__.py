"""A small cluster for property tests: real cores, messages that a test delivers one by one.

`network` holds the messages, `holder` and `coordinator` are shells without I/O around
`replication.inventory` and `tiered.job`, `trainer` the ranks, `model` the judge, and `cluster` what
a test can do to all of them. Nothing here draws random numbers: the test does, so that Hypothesis
can shrink what it finds. `tests.sim` is the larger sister: timed, seeded, with S3.
"""
