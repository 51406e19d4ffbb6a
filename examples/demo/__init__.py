"""`make demo`: train a small GPT on a real cluster, kill a host, resume from a buddy's RAM.

Four raylets, a real S3 server and a Ray Train `TorchTrainer` of three workers. The same job runs
twice, first undisturbed and without checkpoints, then with `tiered` and a SIGKILL in the middle;
the losses of both are compared bit for bit.

    __main__.py   the command: starts everything, runs both, reports, stops everything
    train.py      the train function; shows how a training loop uses `tiered`
    model.py      the GPT
    data.py       the text (the standard library's sources), and a sampler that can be resumed
    events.py     what happened: one JSON line an event, written by workers, read by the driver
    runs.py       starts a Ray Train run and follows it by its events
    faults.py     when and whom to kill
    facts.py      the verdict, computed afterwards from both runs' events alone
    report.py     the table, the picture and the line of JSON
    screen.py     what is seen meanwhile
"""
