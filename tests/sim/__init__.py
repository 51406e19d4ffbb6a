"""A seeded simulator of the whole cluster: the real cores, virtual time, one thread.

What is real: `replication.inventory`, `replication.membership`, `tiered.job` with its parts,
`tiered.history`, and the names and records of `tiered.register`. What is simulated: the shells
around them (`tests.sim.holder`, `tests.sim.coordinator`), Ray, S3, the trainers and their launcher,
the network, and every way in which those fail. A run has two phases: faults on, in which only
safety is judged; then everything heals, and the cluster has to converge within a deadline.

The oracle (`tests.sim.oracle`) knows the bytes, the deaths and what was told to whom. It shares no
decision with the cores.

    python -m tests.sim --seed 7                     one small run, as a trace
    python -m tests.sim --seeds 1000                 a thousand of them
    python -m tests.sim --seed 7 --hosts 64 --hours 24
    python -m tests.sim --mutants --seeds 1000       broken cores: how often each is caught
"""
