"""Students: the losses by hand, teachers of any kind, and the twin without a teacher that is always trained beside."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import same_state
from recipes import error, rows, squeeze, trained
from torch import nn

import rewardzip as rz
from rewardzip.distil import _comparison, _Judged, nearest
from rewardzip.steps import Work, from_dict
from rewardzip.teach import _Loss, distil, task_loss


@pytest.fixture(scope="module")
def model():
    return trained()


def loss(form, task=0.0, temperature=1.0, hard=False, spread=1.0):
    return _Loss(1, form, task, temperature, hard, spread)


class Given(nn.Module):
    """A student whose answers are its input, and no features."""

    maps, names, seen = (), (), {}

    def forward(self, x):
        return x


def test_the_regression_form():
    out, teacher, reward = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0]), torch.tensor([0.0, 2.0])
    batch = rz.Data((out, teacher), reward)
    # 0.25 * (1 + 0) / 2 + 0.75 * (0.25 + 0) / 2
    assert float(loss("regression", task=0.25)(Given(), batch)) == pytest.approx(0.25 * 0.5 + 0.75 * 0.125)


def test_the_pairwise_form():
    out, teacher = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 3.0])
    t = 2.0 * 1.5  # temperature times the spread of the teacher's rewards
    p, s = 1 / (1 + math.exp(-3 / t)), 1 / (1 + math.exp(-1 / t))
    cross = -p * math.log(s) - (1 - p) * math.log(1 - s)
    wanted = (2 * cross + 2 * math.log(2)) / 4 * 2.0**2  # two orders of the pair, and each row with itself
    got = loss("pairwise", temperature=2.0, spread=1.5)(Given(), rz.Data((out, teacher)))
    assert float(got) == pytest.approx(wanted, rel=1e-5)
    hard = float(loss("pairwise", hard=True)(Given(), rz.Data((out, teacher))))
    assert hard == pytest.approx((2 * -math.log(1 / (1 + math.exp(-1))) + 2 * math.log(2)) / 4, rel=1e-5)


def test_the_softmax_form():
    out, teacher = torch.randn(5, 4), torch.randn(5, 4)
    p, s = (teacher / 3).softmax(-1), (out / 3).softmax(-1)
    wanted = (p * (p / s).log()).sum(-1).mean() * 9
    batch = rz.Data((out, teacher))
    assert float(loss("softmax", temperature=3.0)(Given(), batch)) == pytest.approx(float(wanted), rel=1e-4)
    hard = F.cross_entropy(out, teacher.argmax(-1))
    assert float(loss("softmax", hard=True)(Given(), batch)) == pytest.approx(float(hard), rel=1e-5)
    labels = torch.tensor([0, 1, 2, 3, 0])
    mixed = loss("softmax", task=0.5, hard=True)(Given(), rz.Data((out, teacher), labels))
    assert float(mixed) == pytest.approx(float(hard + F.cross_entropy(out, labels)) / 2, rel=1e-5)


def test_preferences_are_a_task_too():
    won, lost = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0])
    batch = rz.Data((won, won + 1), None, (lost, lost))
    margin = -F.logsigmoid(won - lost).mean()
    assert float(loss("regression", task=0.5)(Given(), batch)) == pytest.approx(float(margin / 2 + 0.5 * 0.5))
    assert float(task_loss(Given(), rz.Data((won,), None, (lost,)))) == pytest.approx(float(margin))


@pytest.mark.parametrize("form", ["regression", "pairwise"])
def test_a_student_learns_the_teachers_order(model, form):
    data = rows(1024)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    step = rz.Distil((12,), form=form, steps=150, learning_rate=1e-2, temperature=1.0 if form == "regression" else 0.5)
    student, notes = squeeze(model, step, data=data)
    assert isinstance(student, rz.RewardMLP)
    assert student.hidden == (12,)
    from rewardzip.fidelity import pair_agreement

    with torch.no_grad():
        fresh = rows(1000, seed=1).inputs
        assert pair_agreement(model(*fresh), student(*fresh)) > 0.8
    assert "3 seeds" in notes[0]
    assert notes[0].count("without the teacher") == 2
    assert "istillation" in notes[0]
    assert same_state(before, model.state_dict())
    again, _ = squeeze(model, step, data=data)
    assert same_state(student.state_dict(), again.state_dict())


def test_a_blended_student_learns_the_teachers_order(model):
    student, notes = squeeze(model, rz.Distil((8,), task=0.0, steps=300, learning_rate=1e-2, blend=True), data=rows())
    assert float(notes[0].partition("with the model ")[2].partition(" ")[0]) > 0.85
    assert student.hidden == (8,)
    with pytest.raises(ValueError, match="whole numbers"):
        rz.Distil(task=0.0, blend=True).check(model, rz.Data((torch.randn(20, 6), torch.ones(20, 2, dtype=torch.long))))


def test_without_rewards_the_notes_say_what_is_missing(model):
    data = rz.Data(rows().inputs)
    student, notes = squeeze(model, rz.Distil((8,), steps=100, learning_rate=1e-2), data=data)
    assert "no rewards, so there is no student without the teacher" in notes[0]
    mixed, _ = squeeze(model, rz.Distil((8,), steps=100, learning_rate=1e-2, amp="bfloat16"), data=data)
    assert not torch.equal(mixed.net[0].weight, student.net[0].weight)
    assert error(model, mixed, data) < 1.1 * error(model, student, data) + 0.05
    assert error(model, student, data) < float(model(*data.inputs).detach().var())


def test_students_without_the_teacher_are_the_same_ones_on_the_rewards(model):
    step, work = rz.Distil((8,), steps=30), Work(model, rows(), progress=False)
    taught, alone = step.students(work)
    assert len(taught) == len(alone) == 3
    twin = step.make(model, work.data, 0)
    rz.fit(twin, work.data.split(0.2, 0)[0], steps=30, learning_rate=2e-3, progress=False)
    assert same_state(alone[0].student.state_dict(), twin.state_dict())
    assert not same_state(taught[0].student.state_dict(), twin.state_dict())
    assert nearest(alone) is max(alone, key=lambda s: s.agreement).student


def test_the_verdict_counts_what_is_above_the_noise():
    def students(agreements, losses):
        return [_Judged(a, loss, nn.ReLU()) for a, loss in zip(agreements, losses, strict=True)]

    base = students([0.90, 0.91, 0.92], [1.0, 1.1, 1.2])
    same = students([0.91, 0.90, 0.92], [1.2, 1.1, 1.0])
    nearer = students([0.96, 0.97, 0.98], [1.0, 1.1, 1.2])
    truer = students([0.90, 0.91, 0.92], [0.5, 0.6, 0.7])
    assert "did not help" in _comparison(same, base)
    assert _comparison(nearer, base).endswith("helped with agreement")
    assert _comparison(truer, base).endswith("helped with the rewards")
    assert "did not help" in _comparison(base, truer)


class Conv(nn.Module):
    def __init__(self, outputs=None) -> None:
        super().__init__()
        self.conv, self.head, self.outputs = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 36, outputs or 1), outputs

    def forward(self, image):
        out = self.head(torch.relu(self.conv(image)).flatten(1))
        return out if self.outputs else out.squeeze(1)


def test_neurons_of_any_students_can_go():
    torch.manual_seed(0)
    teacher, image = Conv().eval(), torch.randn(300, 1, 6, 6)
    student, _ = squeeze(teacher, rz.Distil((16, 8), steps=5), rz.Prune("neurons", 0.5), data=rz.Data((image,)))
    assert student.hidden == (8, 4)
    assert student(image).shape == (300,)


def test_a_conv_teacher_for_an_mlp(tmp_path):
    torch.manual_seed(0)
    teacher, image = Conv().eval(), torch.randn(300, 1, 6, 6)
    step = rz.Distil((16,), steps=150, learning_rate=1e-2, features=(("conv", "net.0"),))
    student, _ = squeeze(teacher, step, data=rz.Data((image,)))
    assert type(student) is rz.MLP
    out = student(image)
    assert out.shape == (300,)
    assert (out - teacher(image)).square().mean() < 0.7 * teacher(image).var()
    assert not any(m._forward_hooks for m in student.modules())
    assert not any(m._forward_hooks for m in teacher.modules())
    fast = rz.swap(student, rz.Int8())
    rz.save(fast, tmp_path / "m")
    assert torch.equal(rz.load(tmp_path / "m")(image), fast(image))


def test_a_teacher_that_sees_other_inputs_of_the_same_rows():
    torch.manual_seed(0)
    teacher, state = Conv(3).eval(), torch.randn(400, 36)
    data, image = rz.Data((state,)), rz.Data((state.view(400, 1, 6, 6),))
    student = nn.Sequential(nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 3))
    losses = distil(
        student,
        teacher,
        data,
        teacher_data=image,
        form="softmax",
        task=0,
        steps=150,
        learning_rate=1e-2,
        progress=False,
    )
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    with pytest.raises(ValueError, match="teacher has 10 rows, the student 400"):
        distil(student, teacher, data, teacher_data=image[:10], task=0)


def make_student():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def make_wrong():
    return nn.Linear(5, 2)


def test_several_outputs_and_a_factory():
    torch.manual_seed(0)
    teacher, x = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 3)), torch.randn(300, 5)
    data = rz.Data((x,), teacher(x).argmax(-1))
    step = rz.Distil(f"{__name__}:make_student", form="softmax", temperature=2.0, steps=100, learning_rate=1e-2)
    student, notes = squeeze(teacher, step, data=data)
    assert type(student[1]) is nn.Tanh
    assert float((student(x).argmax(-1) == teacher(x).argmax(-1)).float().mean()) > 0.8
    assert "loss on the rewards" in notes[0]
    assert from_dict(step.to_dict()) == step
    with pytest.raises(ValueError, match=r"student gives \(2, 2\), the model \(2, 3\)"):
        rz.Distil(f"{__name__}:make_wrong", form="softmax").check(teacher, data)
    with pytest.raises(ValueError, match="3 outputs"):
        rz.Distil((4,), form="pairwise").check(teacher, data)


def test_refused_before_any_work(model):
    with pytest.raises(ValueError, match="softmax' over one output is 1 whatever"):
        rz.Distil((4,), form="softmax").check(model, rows())
    with pytest.raises(ValueError, match="softmax' over one output"):
        rz.Distil((4,), form="softmax").check(nn.Linear(6, 1), rz.Data((torch.randn(20, 6),)))
    with pytest.raises(ValueError, match="needs data"):
        rz.Distil((4,)).check(model, None)
    with pytest.raises(ValueError, match="9 rows are too few"):
        rz.Distil((4,)).check(model, rows()[:9])
    with pytest.raises(ValueError, match=r"'net\.9', which RewardMLP does not have"):
        rz.Distil((4,), features=(("net.9", "net.0"),)).check(model, rows())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"form": "hinge"}, "form is 'hinge'"),
        ({"student": "package"}, "package.module:function"),
        ({"task": 1.0}, "task=1.0"),
        ({"form": "pairwise", "temperature": 0}, "temperature=0"),
        ({"temperature": 2.0}, "compares numbers"),
        ({"hard": True}, "compares numbers"),
        ({"seeds": 2}, "3 or more"),
        ({"steps": 0}, "1 or more"),
        ({"amp": "int8"}, "amp is 'int8'"),
        ({"blend": True}, "blend is for .* task=0.5"),
        ({"blend": True, "task": 0.0, "form": "pairwise"}, "blend is for .* not form='pairwise'"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        rz.Distil(**settings)
