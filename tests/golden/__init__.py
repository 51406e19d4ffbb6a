"""Golden traces: what the cores answer to a story of events, as text for a person who reviews it.

    # why this is a story at all
    settings ranks=2 replicas=1        of the job and of the traces; may come again before a life
    given begun one on A B C           an event, or several, whose commands are not shown
    +1.0s report B g1s10/r0            one event a line, a second after the one before
        committed g1s10, 2 copies      below it the commands that it caused, in order

Hosts are letters, `A'` is the next holder on host A. `g1s10` is step 10 as saved by generation 1,
`g1s10/r0` rank 0's shard of it, `g1s10/r0#1` that shard's second chunk. A line without a host is
an event of the coordinator's core (`tiered.job`), one that starts with `A:` of host A's holder
(`replication.inventory`), a line `hosts: ...` of `replication.membership`. A line that starts with
`?` asks a core what it knows, and changes nothing. `tests/golden/events.py` has every verb.

Nothing is sent by itself: a command becomes an event of another core only where the story says so,
so that it may as well be lost, late or doubled.

    python -m tests.golden              compares every story with what the cores do
    python -m tests.golden --update     writes down what the cores do; review the difference
"""
