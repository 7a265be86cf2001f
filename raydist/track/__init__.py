"""What a run tells: metrics, trackers, progress, report. Runs on the driver and reads only the run's folder.

    metrics.jsonl ──> records ──┬──> progress    a live line for people
                                ├──> tracker     curves: mlflow, tensorboard, wandb
    job, status, data, ledger ──┴──> report      one self-contained page
    job, trials of a sweep ────────> sweep_page  another

Reading a run needs neither Ray nor torch.
"""
