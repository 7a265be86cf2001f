"""What a run says of itself, for people and for trackers. In the driver, from the run's folder alone.

    run ──phases, records──> Listener ──> progress      a live view, or lines

    the run's folder ──> records ──┬──> tracker ──> mlflow, tensorboard, wandb
                                   ├──> report          one self-contained page
    trials of a sweep ─────────────┴──> sweep_page      another

    listener      what may hear of a run while it goes on
    progress      what a person sees of it in a terminal or a text file
    records       reads the records: as they are written, and as one history of all attempts
    ettr          how much of a run's time went into steps that count
    silence       whether a run makes no progress, and for how long
    tracker       follows a run for a tracker, in a thread; start: those that a job asks for
    mlflow, tensorboard, wandb    where a tracker sends records
    report, sweep_page, plots     pages as HTML, and their curves as SVG
    humanize      numbers, durations and dates as people read them

Reading a run needs neither Ray nor torch.
"""
