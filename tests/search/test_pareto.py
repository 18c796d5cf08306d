import numpy as np
import pytest

from flash.search.pareto import choose_winners, hypervolume, non_dominated

# A staircase (1, 3), (2, 2), (3, 1), a point behind it and a copy.
POINTS = [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (3.0, 3.0), (2.0, 2.0)]


def test_a_point_beaten_by_another_and_the_second_of_two_equals_are_dominated():
    assert non_dominated(POINTS).tolist() == [True, True, True, False, False]
    assert non_dominated([]).tolist() == []


def test_hypervolume_of_hand_worked_staircase():
    # Columns from x=1, 2, 3 to 4 with heights 1, 2, 3.
    assert hypervolume(POINTS, (4.0, 4.0)) == pytest.approx(6.0)
    assert hypervolume(POINTS[:1], (4.0, 4.0)) == pytest.approx(3.0)


def test_points_beyond_the_reference_add_no_hypervolume():
    assert hypervolume([(5.0, 0.0), (0.0, 4.0)], (4.0, 4.0)) == 0.0
    assert hypervolume([], (4.0, 4.0)) == 0.0


def test_hypervolume_in_three_dimensions_is_the_union_of_boxes():
    # Boxes 2x2x1 and 1x1x2 up to (2, 2, 2), which share 1x1x1.
    assert hypervolume([(0, 0, 1), (1, 1, 0)], (2.0, 2.0, 2.0)) == pytest.approx(5.0)


def test_first_winner_is_the_knee_and_the_others_spread():
    x = np.linspace(0.5, 8, 16)
    curve = np.column_stack([x, 8 / x])
    winners = choose_winners(curve, (10.0, 20.0), 3)
    knee, *others = (curve[i, 0] for i in winners)
    assert min(others) < knee < max(others)


def test_of_two_points_in_a_gap_the_less_similar_one_wins():
    points = [(1.0, 9.0), (5.0, 5.0), (5.3, 4.9), (9.0, 1.0)]
    similar, reference = np.ones((4, 4)), (10.0, 10.0)
    assert choose_winners(points, reference, 2)[0] == 1
    similar[1, 2] = similar[2, 1] = 0.01
    assert choose_winners(points, reference, 3, similar)[:3] == [1, 0, 3]
    similar[1] = similar[:, 1] = 0.01  # all are near the first, and volume decides again
    assert choose_winners(points, reference, 3, similar) == choose_winners(points, reference, 3)


def test_no_more_winners_than_points_that_count():
    assert choose_winners([(1.0, 1.0), (2.0, 2.0), (9.0, 0.5)], (4.0, 4.0), 3) == [0]
