"""Metrics on examples small enough to compute by hand."""

import math

import numpy as np
import pytest

from zoo_remote_sensing import metrics


def test_binary_change():
    # 2 hits, 1 false alarm, 1 miss, 6 quiet: F1 = 4/6, IoU = 2/4; one more pixel is ignored
    measure = metrics.BinaryChange()
    measure.update([1, 1, 1, 0], [1, 1, 0, 1])
    measure.update([0, 0, 0, 0, 0, 0, 255], [0, 0, 0, 0, 0, 0, 1])
    found = measure.compute()
    assert found["OA"] == pytest.approx(0.8)
    assert found["precision"] == found["recall"] == found["F1"] == pytest.approx(2 / 3)
    assert found["IoU"] == pytest.approx(0.5)
    assert found["mIoU"] == pytest.approx((2 / 4 + 6 / 8) / 2)
    # chance: 0.3 * 0.3 + 0.7 * 0.7 = 0.58; (0.8 - 0.58) / 0.42
    assert found["kappa"] == pytest.approx(0.22 / 0.42)


def test_classes():
    # truth 0 0 0 0 1 1 2 2, found 0 0 0 1 1 1 1 2; class 3 occurs nowhere
    measure = metrics.Classes(["a", "b", "c", "d"])
    measure.update([0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 1, 2])
    found = measure.compute()
    assert found["OA"] == pytest.approx(6 / 8)
    assert found["AA"] == pytest.approx((3 / 4 + 1 + 1 / 2) / 3)
    # chance: (4 * 3 + 2 * 4 + 2 * 1) / 64 = 22 / 64; (48 - 22) / (64 - 22)
    assert found["kappa"] == pytest.approx(26 / 42)
    # F1: 6/7, 4/6, 2/3; IoU: 3/4, 2/4, 1/2
    assert found["F1"] == pytest.approx((6 / 7 + 4 / 6 + 2 / 3) / 3)
    assert found["mIoU"] == pytest.approx((3 / 4 + 2 / 4 + 1 / 2) / 3)
    rows = measure.per_class()
    assert list(rows) == ["a", "b", "c"]
    assert rows["b"] == pytest.approx({"accuracy": 1.0, "F1": 4 / 6, "IoU": 0.5})


def test_semantic_change_in_pairs_of_classes():
    # 3 classes (0: unchanged), so codes 1 to 4. 6 quiet pixels, 1 false alarm (code 1), 2 hits of code 2, 1 miss of
    # code 2, 1 of code 3 taken for code 4
    truth_before, truth_after = [0] * 6 + [0, 1, 1, 1, 2], [0] * 6 + [0, 2, 2, 2, 1]
    found_before, found_after = [0] * 6 + [1, 1, 1, 0, 2], [0] * 6 + [1, 2, 2, 0, 2]
    measure = metrics.SemanticChange(3)
    measure.update((truth_before, truth_after), (found_before, found_after))
    found = measure.compute()
    assert found["OA"] == pytest.approx(8 / 11)
    # changed: 3 found of 4, 1 false alarm
    assert found["F1"] == pytest.approx(6 / 8)
    assert found["IoU"] == pytest.approx(3 / 5)
    assert found["mIoU"] == pytest.approx((3 / 5 + 6 / 8) / 2)
    # 2 right codes of 4 found and of 4 there
    assert found["F_scd"] == pytest.approx(0.5)
    # without the quiet pixels: truth 0 2 2 2 3, found 1 2 2 0 4; agreed 2/5, chance (1*1 + 3*2) / 25
    kappa = (2 / 5 - 7 / 25) / (1 - 7 / 25)
    assert found["SeK"] == pytest.approx(kappa * math.exp(3 / 5 - 1))
    # all pixels: agreed 8/11; truth 7 0 3 1 0, found 7 1 2 0 1 of the codes 0 to 4; chance (49 + 6) / 121
    assert found["kappa"] == pytest.approx((8 / 11 - 55 / 121) / (1 - 55 / 121))


def test_semantic_change_date_by_date():
    measure = metrics.SemanticChange(3, "dates")
    measure.update(([0, 1, 1], [0, 2, 2]), ([0, 1, 2], [0, 2, 2]))
    found = measure.compute()
    assert found["OA"] == pytest.approx(5 / 6)
    assert found["IoU"] == found["F1"] == found["mIoU"] == pytest.approx(1.0)
    assert found["F_scd"] == pytest.approx(3 / 4)
    # the 4 changed samples: truth 1 1 2 2, found 1 2 2 2: agreed 3/4, chance (2*1 + 2*3) / 16
    assert found["SeK"] == pytest.approx((3 / 4 - 1 / 2) / (1 - 1 / 2))
    with pytest.raises(ValueError, match="'pairs' or 'dates'"):
        metrics.SemanticChange(3, "both")


def test_damage():
    # 10 pixels, 6 of buildings, of which 5 are found, with 1 false alarm: F1_loc = 10 / 12
    building = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    found_building = [1, 1, 1, 1, 1, 0, 1, 0, 0, 0]
    damage, found_damage = [1, 1, 2, 3, 4, 4, 0, 0, 0, 0], [1, 2, 2, 3, 4, 4, 3, 0, 0, 0]
    names = ["background", "none", "minor", "major", "destroyed"]
    measure = metrics.Damage(names)
    measure.update(building, damage, found_building, found_damage)
    found = measure.compute()
    # inside true buildings: F1 of the grades 2/3, 2/3, 1, 1
    harmonic = 4 / (1.5 + 1.5 + 1 + 1)
    assert found["F1_loc"] == pytest.approx(10 / 12)
    assert found["F1_clf"] == pytest.approx(harmonic)
    assert found["F1"] == pytest.approx(0.3 * 10 / 12 + 0.7 * harmonic)
    assert found["IoU"] == pytest.approx(5 / 7)
    assert found["OA"] == pytest.approx(5 / 6)

    measure = metrics.Damage(names)
    measure.update(building, damage, building, [1, 1, 2, 3, 1, 1, 0, 0, 0, 0])
    assert measure.compute()["F1_clf"] == 0.0  # a grade that is never found


def test_nothing_changed_and_nothing_found():
    measure = metrics.SemanticChange(3)
    measure.update(([0, 0], [0, 0]), ([0, 0], [0, 0]))
    found = measure.compute()
    assert (found["OA"], found["F_scd"], found["SeK"]) == (1.0, 0.0, 0.0)
    quiet = metrics.BinaryChange()
    quiet.update([0, 0], [0, 0])
    assert (quiet.compute()["OA"], quiet.compute()["F1"]) == (1.0, 0.0)


def test_shapes_and_labels_are_checked():
    measure = metrics.BinaryChange()
    with pytest.raises(ValueError, match="one shape"):
        measure.update(np.zeros((2, 2)), np.zeros(2))
    with pytest.raises(ValueError, match="expected 0 to 1"):
        measure.update([0, 2], [0, 1])
