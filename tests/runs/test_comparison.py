"""The records of methods side by side: tables, and the settings that a search found best."""

from hf_rwp.runs import comparison


def test_the_table_is_what_the_records_say():
    runs = [("base", 0, 0.5), ("base", 1, 0.6), ("rwp", 0, 0.55), ("rwp", 1, 0.63)]
    settings = {"lr": 0.1, "weight_decay": 5e-4, "strength": 0.01}
    records = [
        {"method": m, "seed": s, "top1": t, "gradients": 2.0, "seconds": 10.0, "settings": settings}
        | {"history": [{"train_loss": 0.1}]}
        for m, s, t in runs
    ]
    *_, plain, rwp = comparison.comparison_table(records).splitlines()
    assert plain == "| plain | 55.00 ± 7.07 |  | 2 | 2 | 10 s | 0.1, 0.0005, 0.01 |"
    assert rwp == "| RWP | 59.00 ± 5.66 | +4.00 ± 1.41 | 2 | 2 | 10 s | 0.1, 0.0005, 0.01 |"


def test_the_best_settings_are_of_the_protocols_own_search_first():
    """Else of the one under equal images, which serves all protocols."""
    trials = [("images", 0.1, 0.5), ("images", 0.2, 0.6), ("gradients", 0.3, 0.4)]
    common = {"kind": "trial", "method": "base"}
    records = [common | {"protocol": p, "settings": {"lr": lr}, "top1": top1} for p, lr, top1 in trials]
    best = {
        protocol: comparison.best_settings(records, "base", protocol) for protocol in ("images", "gradients", "time")
    }
    assert best == {"images": {"lr": 0.2}, "gradients": {"lr": 0.3}, "time": {"lr": 0.2}}
    assert comparison.best_settings(records, "rwp", "images") is None
