"""One run: from its job to a trained model, in one folder.

    job ──> lifecycle ──> preflight ──> dataset ──────> attempts ──────> account ──> report, result
            claims the    refuses what  token logs,     plan, train,     what became
            folder        cannot work   made or found   train again      of each token
            │                               │               │
            └── status, stop requests       └─ rest made    └─ records ──> Listener, trackers
                                               meanwhile

    run           composes all of it: run_job
    lifecycle     who may take a folder, what it goes through, how it ends
    preflight     checks before anything is prepared or trained
    dataset       the tokenizer and the token logs: made where missing, pinned, opened
    attempts      the plan of each attempt, and attempts until one ends by itself
    elastic       how many workers each attempt has, where the job gives a range; when it grows
    hang          an attempt that makes no progress: said, and ended in the end
    notice        a node will be taken away: a checkpoint before that
    describe      the data in figures, for the report and `raydist prepare`
    verify        every file compared with its checksum: `raydist verify`
    step_text     what the model saw in a step: `raydist show`
    text_sample   how the trained model continues a held-out document
    estimate      what a job would cost, without starting anything: `raydist plan`
    calibrate     two steps, for the time and memory that it would take: `raydist plan --measure`
    torchrun      the same run without Ray, by the ranks that torchrun started

Sweeps use lifecycle, preflight and dataset too; each of their trials is a run.
"""
