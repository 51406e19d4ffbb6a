from benchmarks.profiling import Spot, spots

TRAINER = "MainThread;Trainer.save (/w/benchmarks/trainer.py:9)"
SAVE = "Checkpointer.save (/w/tiered/checkpointer.py:{})"
RAW = [
    f"{TRAINER};{SAVE.format(1)};put (/v/ray/worker.py:5) 30",
    f"{TRAINER};{SAVE.format(2)};put (/v/ray/worker.py:7) 10",
    f"{TRAINER};{SAVE.format(3)} 5",
    f"{TRAINER};wait (/v/threading.py:3) 2",
    "worker;digest (/w/replication/checksum.py:4) 40",
    "worker;run (/v/threading.py:4) 9",
]


def test_samples_go_to_our_deepest_function_and_what_it_called() -> None:
    assert spots(RAW) == [
        Spot("Checkpointer.save (tiered/checkpointer.py)", "put (ray/worker.py)", 40),
        Spot("digest (replication/checksum.py)", "", 40),
        Spot("Checkpointer.save (tiered/checkpointer.py)", "", 5),
    ]


def test_only_what_is_below_a_function_can_be_asked_for() -> None:
    found = spots(RAW, below="save (benchmarks/trainer.py)")
    assert [spot.samples for spot in found] == [40, 5, 2]
    assert found[-1].function == "Trainer.save (benchmarks/trainer.py)"


def test_no_samples_make_no_spots() -> None:
    assert spots([]) == []
