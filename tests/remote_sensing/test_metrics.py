"""Metrics on examples small enough to compute by hand."""

import math

import numpy as np
import pytest

from zoo_remote_sensing import metrics


def test_binary_change():
    # 2 hits, 1 false alarm, 1 miss, 6 quiet: F1 = 4/6, IoU = 2/4
    truth = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 255]
    found = metrics.binary_change(truth, [1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1])
    assert found["OA"] == pytest.approx(0.8)
    assert found["precision"] == found["recall"] == found["F1"] == pytest.approx(2 / 3)
    assert found["IoU"] == pytest.approx(0.5)
    # chance: 0.3 * 0.3 + 0.7 * 0.7 = 0.58; (0.8 - 0.58) / 0.42
    assert found["kappa"] == pytest.approx(0.22 / 0.42)


def test_semantic_change():
    # rows truth: 6 unchanged found, 1 false alarm; 2 of one change found, 1 confused with another
    matrix = np.array([[6, 1, 0], [0, 2, 1], [0, 0, 0]])
    found = metrics.semantic_change(matrix)
    assert found["OA"] == pytest.approx(0.8)
    assert found["mIoU"] == pytest.approx((6 / 7 + 3 / 4) / 2)
    assert found["F_scd"] == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    # without (0, 0): total 4, agreed 2/4, chance (1*0 + 3*3 + 0*1) / 16 = 9/16: kappa = -1/7
    assert found["SeK"] == pytest.approx(-1 / 7 * math.exp(3 / 4 - 1))


def test_damage_score_is_zero_where_a_grade_is_never_found():
    grades = np.diag([0, 3, 2, 1, 4])
    assert metrics.damage_score(np.array([[5, 0], [0, 5]]), grades)["F1"] == pytest.approx(1.0)
    grades[4, 4], grades[4, 1] = 0, 4
    found = metrics.damage_score(np.array([[5, 0], [0, 5]]), grades)
    assert (found["F1_clf"], found["F1"]) == (0.0, pytest.approx(0.3))


def test_from_to_codes():
    codes = metrics.from_to_codes([1, 2, 6, 3], [2, 1, 6, 4], [1, 1, 1, 0], classes=7)
    assert codes.tolist() == [2, 7, 36, 0]


def test_shapes_and_labels_are_checked():
    with pytest.raises(ValueError, match="one shape"):
        metrics.confusion([0, 1], [0], 2)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        metrics.confusion([0, 2], [0, 1], 2)
