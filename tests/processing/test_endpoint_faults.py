"""The acceptance run of the endpoint client at a size for every day: faults, and kill -9 twice."""

from benchmarks.endpoint_faults import BILLED, CONCURRENCY, FAULTS, REFUSED, fault_run


def test_nothing_is_lost_or_asked_again_and_all_is_reported(tmp_path):
    found = fault_run(400, str(tmp_path))
    assert found["lost"] == found["asked_again"] == 0
    assert found["unreported"] == {}
    first, second, third = found["kept_after_each_run"]
    assert 0 < first < second < third == 400 - 400 // REFUSED
    assert found["answered_twice"] <= 2 * CONCURRENCY  # under way when its client was killed
    assert set(found["faults"]) == set(FAULTS) and set(BILLED) < set(FAULTS)
    assert 0.15 < found["faults"].total() / found["tries"] < 0.25
