"""What a run tells: metrics, MLflow, progress, report. Runs on the driver and reads only the run's folder.

    metrics.jsonl ──> records ──┬──> progress    a live line for people
                                ├──> mlflow      parameters, curves and files
    job, status, data, ledger ──┴──> report      one self-contained page
    job, trials of a sweep ────────> sweep_page  another

Reading a run needs neither Ray nor torch.
"""
