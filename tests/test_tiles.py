"""Measured tiles: they are launched, each candidate is right, and a file that does not fit leaves the rule."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import GPU, need_triton
from mlp_numerics import assert_head, assert_mlp, random_head, random_mlp
from numerics import assert_dynamic, assert_linear, quantized

triton = pytest.importorskip("triton")

from rewardzip_kernels import audit  # noqa: E402
from rewardzip_kernels.gpu import fused_mlp, int8_linear, reward_head, sparse24_linear, tiles  # noqa: E402
from rewardzip_kernels.gpu.int8_dynamic_linear import int8_dynamic_linear  # noqa: E402
from rewardzip_kernels.mlp_layout import layout, parse_layers  # noqa: E402
from rewardzip_kernels.sparse24_layout import pack  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
NET = "24: 64 relu, 64 relu, 1"
WIDE = "24: 256 relu, 256 relu, 1"


def launched(call):
    """The first launch of a call on meta tensors: its tile by the kernel's own names, with warps and stages."""
    kernel, grid, args, options = audit.recorded(call)[0]
    sizes = {name: v for name, v in zip(kernel.arg_names, args, strict=True) if name.startswith(audit.SIZES)}
    return tuple(sizes.values()), options["num_warps"], options["num_stages"], grid


def linear_on_meta(m, k=512, dtype=torch.float16):
    return partial(audit._linear, "int8_linear", m, 512, k, dtype)


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Put a file where the user's or the package's tables are; the tables of the tests' own process stay out."""

    def put(text, shipped=False):
        file = tmp_path / ("shipped.json" if shipped else "rewardzip/tiles.json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text if isinstance(text, str) else json.dumps(text))
        tiles.forget()
        return file

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path / "shipped.json")
    tiles.forget()
    yield put
    monkeypatch.undo()
    tiles.forget()


BUCKET = "int8_linear 256x512x512 2 1"
PLANTED = (32, 64, 64, 1, 8, 3)
RULE = ((1, 64, 64, 64), 4, 4, (32, 1, 1))


def test_a_planted_tile_is_launched(plant):
    assert launched(linear_on_meta(200)) == RULE
    plant([{**tiles.identity(-1), "tiles": {BUCKET: list(PLANTED)}}])
    assert launched(linear_on_meta(200)) == ((1, 32, 64, 64), 8, 3, (56, 1, 1))
    assert launched(linear_on_meta(256)) == ((1, 32, 64, 64), 8, 3, (64, 1, 1)), "the same bucket"
    for other in (linear_on_meta(257), linear_on_meta(64), linear_on_meta(200, 520), linear_on_meta(200, 500)):
        assert launched(other)[1:3] != (8, 3), "not the bucket"
    assert launched(linear_on_meta(200, dtype=torch.float32))[1:3] == (4, 4), "other rows"


def test_shipped_tables_hold_for_any_torch_and_the_users_own_comes_first(plant):
    shipped = {**tiles.identity(-1), "torch": "0", "rewardzip": "0", "tiles": {BUCKET: list(PLANTED)}}
    plant([shipped], shipped=True)
    assert launched(linear_on_meta(200))[1:3] == (8, 3)
    plant([{**tiles.identity(-1), "tiles": {BUCKET: [64, 128, 64, 1, 4, 3]}}])
    assert launched(linear_on_meta(200))[0] == (1, 64, 128, 64)
    plant([shipped | {"triton": "0"}], shipped=True)
    plant("[]")
    assert launched(linear_on_meta(200)) == RULE


def test_the_shipped_file_is_empty_or_of_named_devices():
    for table in json.loads(tiles.SHIPPED.read_text()):
        assert {"device", "triton", "torch", "rewardzip", "tiles"} == set(table)
        assert table["device"] != "interpreter"


def fitting(**change):
    return [{**tiles.identity(-1), "tiles": {BUCKET: list(PLANTED)}} | change]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "7",
        "[" * 100_000,
        '[{"tiles": {}}, 3, null]',
        "\x00\x00",
        json.dumps(fitting())[:-9],
        {"device": "interpreter", "tiles": {BUCKET: list(PLANTED)}},
        fitting(device="another device"),
        fitting(triton="0.1"),
        fitting(torch="0.1"),
        fitting(rewardzip="99"),
        fitting(tiles=[]),
        fitting(tiles={BUCKET: None}),
        fitting(tiles={BUCKET: "tile"}),
        fitting(tiles={BUCKET: [32, 64, 64, 1, 8]}),
        fitting(tiles={BUCKET: [32, 64, 64, 1, 8, 3, 3]}),
        fitting(tiles={BUCKET: [33, 64, 64, 1, 8, 3]}),
        fitting(tiles={BUCKET: [1 << 20, 64, 64, 1, 8, 3]}),
        fitting(tiles={BUCKET: ["32", "64", "64", 1, 8, 3]}),
        fitting(tiles={BUCKET: [[32], {}, None, 1, 8, 3]}),
    ],
    ids=str,
)
def test_a_file_that_does_not_fit_leaves_the_rule(plant, text):
    plant(text)
    assert launched(linear_on_meta(200)) == RULE


def test_a_file_that_cannot_be_opened_leaves_the_rule(plant, tmp_path):
    (tmp_path / "rewardzip").mkdir()
    (tmp_path / "rewardzip" / "tiles.json").mkdir()
    tiles.forget()
    assert launched(linear_on_meta(200)) == RULE


def test_files_are_read_once_a_process_and_at_no_import(plant, monkeypatch):
    file = plant(fitting())
    before, reads = tiles.read, []
    monkeypatch.setattr(tiles, "read", lambda file: reads.append(file) or before(file))
    for m in (100, 200, 250, 64):
        launched(linear_on_meta(m))
    assert reads == [tiles.SHIPPED, file]
    code = (
        "import sys; opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "import rewardzip, rewardzip_kernels.gpu.reward_head, rewardzip_kernels.gpu.fused_mlp\n"
        "print(len(opened) > 99, [name for name in opened if 'tiles.json' in name])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "True []\n", (done.stdout, done.stderr)


def test_saving_keeps_other_tables_and_leaves_no_draft(plant, tmp_path):
    other = {**tiles.identity(-1), "device": "another device", "tiles": {BUCKET: [1]}}
    file = plant([other, *fitting()])
    tiles.save(file, -1, {BUCKET: (64, 128, 64, 1, 4, 3)})
    assert json.loads(file.read_text()) == [other, *fitting(tiles={BUCKET: [64, 128, 64, 1, 4, 3]})]
    assert [f.name for f in file.parent.iterdir()] == ["tiles.json"]
    assert launched(linear_on_meta(200))[0] == (1, 64, 128, 64), "seen at once by the process that wrote it"


def test_a_write_that_fails_leaves_the_old_file(plant, monkeypatch):
    file = plant(fitting())
    before = file.read_text()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        tiles.save(file, -1, {})
    assert [f.name for f in file.parent.iterdir()] == ["tiles.json"]
    assert file.read_text() == before


def test_a_compiled_kernel_is_kept_by_its_whole_tile(monkeypatch):
    """Two tiles that differ in warps or stages alone are two kernels."""
    from rewardzip_kernels.gpu import launch

    compiled = []
    monkeypatch.setattr(launch, "off_gpu", lambda *told: compiled.append(told) or None)
    kept = set()
    monkeypatch.setattr(launch, "_compiled", type("Keys", (dict,), {"get": lambda self, key: kept.add(key)})())
    q, scale = torch.zeros(512, 512, dtype=torch.int8), torch.ones(512)
    x, head = torch.zeros(200, 512).half(), torch.zeros(1, 512)
    for tile in (PLANTED, (*PLANTED[:4], 4, 3), (*PLANTED[:4], 4, 4)):
        small = tile[:3] + tile[4:]
        with tiles.planted({BUCKET: tile, "reward_head 256x512x512 2 1": small}):
            monkeypatch.setattr(int8_linear, "candidates", lambda *_, t=tile: [int8_linear.Tile(*t)])
            monkeypatch.setattr(reward_head, "candidates", lambda *_, t=small: [reward_head.Tile(*t)])
            int8_linear.int8_linear(x, q, scale)
            reward_head.reward_head(x, q, scale, None, head)
    assert len(compiled) == 3 * 3
    assert len({key for key in kept if key[0] is int8_linear._int8_linear_kernel}) == 3
    assert len({key for key in kept if key[0] is reward_head._reward_head_kernel}) == 3


@pytest.mark.parametrize("layers", [NET, WIDE])
def test_the_other_ops_launch_planted_tiles(layers):
    net = layout(layers, True)
    for m in (100, 20_000, 100_000):
        case = net, fused_mlp.row_class(m), False, torch.float16
        for tile in fused_mlp.candidates(*case):
            with tiles.planted({fused_mlp.bucket(*case): tile}):
                sizes, warps, _, _ = launched(partial(audit._mlp, layers, m))
            assert (*sizes, warps) == (tile.block_m, tile.slice, tile.out, tile.warps)
    for m in (1, 16, 5000):
        for stored in (torch.int8, torch.bfloat16):
            bucket = tiles.linear_bucket("reward_head", m, 4096, 4096, 2, stored.itemsize)
            for tile in reward_head.candidates(m, 4096, 4096, 2):
                with tiles.planted({bucket: tile}):
                    sizes, warps, stages, _ = launched(partial(audit._head, m, 1, torch.bfloat16, stored))
                assert (*sizes[tile.block_m == 0 :], warps, stages) == tile[tile.block_m == 0 :] or tile.block_m == 0


# rows, outputs, inputs: of few rows, of K in parts, of many rows, of odd sizes
LINEAR = [(3, 33, 70), (5, 9, 1100), (33, 9, 1030), (130, 70, 48)]


@pytest.mark.parametrize(("m", "n", "k"), LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
def test_every_candidate_of_int8_linear_is_right(m, n, k, dtype, poisoned):
    need_triton()
    q, scale, bias = quantized(n, k, DEVICE)
    x = torch.randn(m, k, device=DEVICE)
    bucket = tiles.linear_bucket("int8_linear", m, n, k, dtype.itemsize, 1)
    for tile in int8_linear.candidates(m, n, k, dtype.itemsize):
        with tiles.planted({bucket: tile}):
            if dtype == torch.int8:
                assert_dynamic(int8_dynamic_linear(x, q, scale, bias, "relu"), x, q, scale, bias, "relu", None)
            else:
                rounding = "tf32" if GPU and dtype == torch.float32 else None
                y = int8_linear.int8_linear(x.to(dtype), q, scale, bias, "relu")
                assert_linear(y, x.to(dtype), q, scale, bias, "relu", rounding)


@pytest.mark.parametrize(("m", "n", "k"), [(3, 33, 70), (9, 33, 300), (16, 33, 256), (70, 33, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
def test_every_candidate_of_sparse24_linear_is_right(m, n, k, dtype, poisoned):
    """The dense way among them, which a table may put earlier or later than the rule."""
    need_triton()
    q, scale, bias = quantized(n, k, DEVICE)
    q[:, torch.arange(k) % 4 >= 2] = 0
    x, stored = torch.randn(m, k, device=DEVICE), pack(q)
    bucket = tiles.linear_bucket("sparse24_linear", m, n, k, dtype.itemsize, 1)
    found = sparse24_linear.candidates(m, n, k, dtype.itemsize, 1)
    assert (sparse24_linear.DENSE in found) == (m > 64)
    for tile in found:
        with tiles.planted({bucket: tile}):
            if dtype == torch.int8:
                y = sparse24_linear.sparse24_linear(x, *stored, scale, k, bias, "relu", dtype)
                assert_dynamic(y, x, q, scale, bias, "relu", None)
            else:
                rounding = "tf32" if GPU and dtype == torch.float32 else None
                y = sparse24_linear.sparse24_linear(x.to(dtype), *stored, scale, k, bias, "relu")
                assert_linear(y, x.to(dtype), q, scale, bias, "relu", rounding)


@pytest.mark.parametrize(("m", "n", "k"), [(3, 33, 70), (33, 33, 70), (130, 70, 48)])
def test_every_candidate_of_reward_head_is_right(m, n, k, poisoned):
    need_triton()
    x, arguments = torch.randn(m, k, device=DEVICE), random_head(n, k, 3)
    bucket = tiles.linear_bucket("reward_head", m, n, k, 4, 1)
    for tile in reward_head.candidates(m, n, k, 4):
        with tiles.planted({bucket: tile}):
            assert_head(reward_head.reward_head, x, arguments)


@pytest.mark.parametrize(
    ("m", "layers"),
    [(14, "17+6: 40 relu, 33 relu, 1"), (130, "17+6: 40 relu, 33 relu, 1"), (40, "9: 130 relu, 20 relu, 3")],
)
def test_every_candidate_of_fused_mlp_is_right(m, layers, monkeypatch, poisoned):
    need_triton()
    monkeypatch.setattr(fused_mlp, "FEW", 16)
    monkeypatch.setattr(fused_mlp, "SOME", 100)
    monkeypatch.setattr(fused_mlp, "_multiprocessors", lambda _: 1)
    weights, params = random_mlp(layers, torch.int8, 1, DEVICE)
    xs = [torch.randn(m, k, device=DEVICE) for k in parse_layers(layers)[0]]
    case = layout(layers, True), fused_mlp.row_class(m), False, torch.float16
    found = fused_mlp.candidates(*case)
    assert len(found) > 5
    for tile in found:
        with tiles.planted({fused_mlp.bucket(*case): tile}):
            y = fused_mlp.fused_mlp(xs, weights, params, layers)
        assert_mlp(y, xs, weights, params, layers, None, "none", torch.float16)


@pytest.mark.parametrize("m", [1, 3, 5, 16, 20, 64, 65, 256, 1000, 5000, 70_000])
@pytest.mark.parametrize("x_bytes", [1, 2, 4])
def test_the_rule_is_the_first_candidate_and_none_is_met_twice(m, x_bytes):
    for op in (int8_linear, reward_head):
        found = op.candidates(m, 512, 512, x_bytes)
        assert found[0] == op.tile(m, 512, 512, x_bytes)
        assert len(set(found)) == len(found) > 5
