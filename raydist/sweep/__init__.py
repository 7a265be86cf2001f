"""A sweep: many runs of one job under Ray Tune, compared by bits per byte of the same held-out text.

    job with tune ──> sweep ──> suggest ──parameters──> trial ──> run_job, a run of its own
                        ▲       Journal: trial k        │
                        └──── best.yaml, page ◀─results─┘ one for each step that is evaluated

    sweep      holds the folder, prepares the tokens once, searches, and says which trial was best
    suggest    the parameters of each trial, by number; kept before the trial begins
    memory     what Optuna knows of the trials, in a journal of the sweep's folder
    trial      one trial: an ordinary run, whose evaluations are its results

A trial is the run <sweep>-003 in the same storage, and its folder says what is known of it. A sweep that is
submitted again goes through the same trials by number: finished ones only repeat the results in their
folders, the others go on from their checkpoints.
"""
