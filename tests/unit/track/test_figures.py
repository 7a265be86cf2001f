from raydist.track.records import figures, flatten


def test_a_job_becomes_flat_parameters() -> None:
    job = {
        "train": {"lr": 0.1, "epochs": None},
        "corpus": {"clean": ["a", {"b": 1}], "x y:ü!": {}},
        "name": "demo",
    }
    assert flatten(job) == {
        "train.lr": "0.1",
        "train.epochs": "null",
        "corpus.clean": '["a", {"b": 1}]',
        "corpus.x y_ü_": "{}",
        "name": "demo",
    }


def test_parameters_hold_no_credentials() -> None:
    assert flatten({"tracking": {"mlflow": "https://ann:hunter2@host/"}}) == {
        "tracking.mlflow": "https://***@host/"
    }


def test_figures_are_named_by_what_they_measure_and_where() -> None:
    about = {"step": 2, "attempt": 1, "time": 1e9}
    train = {"kind": "train", "loss": 2.0, "mfu": None, "tokens_seen": 5, **about}
    assert figures(train) == {"loss": 2.0, "tokens_seen": 5.0}
    evaluation = {"kind": "eval", "source": "my: web", "eval_loss": 3.0, "perplexity": 20.1, **about}
    assert figures(evaluation) == {"eval/my_ web/loss": 3.0, "eval/my_ web/perplexity": 20.1}
    assert figures({"kind": "commit", "samples": 3, **about}) == {}
