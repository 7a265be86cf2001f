"""A sweep: many runs of one job under Ray Tune, compared by bits per byte of the same held-out text.

    suggest   which parameters each trial has, by number; kept in trials.jsonl
    trial     one trial: an ordinary run, whose evaluations are its results
    sweep     all of them: claim the folder, prepare the tokens once, search, tell what was best

Each trial is a run of its own, <sweep>-003, in the same storage; what its folder says is what it is
known by. A sweep that is submitted again goes through the same trials by number: finished ones only
repeat what their folders say, others go on from their checkpoints.
"""
