from raydist.track.mlflow import flatten


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
