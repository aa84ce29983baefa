import pytest
import torch

from sdpo_megatron.algorithm.advantages import group_advantages, sdpo_advantages


def test_teacher_minus_student_where_there_is_a_teacher():
    student_T = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    teacher_T = torch.tensor([-0.5, -4.0, float("nan")])
    advantages_T = sdpo_advantages(teacher_T, student_T, torch.tensor([True, True, False]))
    assert advantages_T.tolist() == [0.5, -2.0, 0.0]
    assert not advantages_T.requires_grad


def test_group_advantages_are_centred_and_not_scaled():
    assert group_advantages([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0]]) == [[0.75, -0.25, -0.25, -0.25], [0.0, 0.0]]
    assert group_advantages([[0.2, 0.4]])[0] == pytest.approx([-0.1, 0.1])
