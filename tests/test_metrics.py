"""Mismatch metrics against numbers worked out by hand, and flip counts of streams whose differences are known."""

from __future__ import annotations

import math

import pytest
import torch

from nvfp4_qat.errors import UserError
from nvfp4_qat.metrics import PREFIX, FlipTracker, rollout_metrics


def measure(train, rollout, mask=None, **options):
    train, rollout = torch.tensor(train), torch.tensor(rollout)
    mask = torch.ones_like(train) if mask is None else torch.tensor(mask)
    return {k.removeprefix(PREFIX): v for k, v in rollout_metrics(train, rollout, mask, **options).items()}


def test_two_sequences_by_hand():
    # log ratios: row 0: ln 2, -ln 2; row 1: ln 3 and padding. So ρ = 2, 1/2, 3.
    ln2, ln3 = math.log(2.0), math.log(3.0)
    train = [[-1.0, -1.0 - ln2], [-0.5, 0.0]]
    rollout = [[-1.0 - ln2, -1.0], [-0.5 - ln3, -99.0]]
    got = measure(train, rollout, [[1, 1], [1, 0]])

    assert got["kl"] == pytest.approx(-ln3 / 3)
    assert got["k3_kl"] == pytest.approx(((2 - 1 - ln2) + (0.5 - 1 + ln2) + (3 - 1 - ln3)) / 3)
    assert got["logprob_abs_diff"] == pytest.approx((2 * ln2 + ln3) / 3)
    assert got["logprob_abs_diff_max"] == pytest.approx(ln3)
    assert got["token_mult_prob_error"] == pytest.approx((2 + 2 + 3) / 3)
    # mean log-probabilities: train -1 - ln2/2 and -1/2; rollout -1 - ln2/2 and -1/2 - ln3
    assert got["training_ppl"] == pytest.approx((math.e * math.sqrt(2) + math.sqrt(math.e)) / 2)
    assert got["training_log_ppl"] == pytest.approx((1 + ln2 / 2 + 0.5) / 2)
    assert got["rollout_ppl"] == pytest.approx((math.e * math.sqrt(2) + 3 * math.sqrt(math.e)) / 2)
    assert got["rollout_log_ppl"] == pytest.approx((1 + ln2 / 2 + 0.5 + ln3) / 2)
    assert got["log_ppl_diff"] == pytest.approx(-ln3 / 2)
    assert got["log_ppl_abs_diff"] == pytest.approx(ln3 / 2)
    assert (got["log_ppl_diff_max"], got["log_ppl_diff_min"]) == (pytest.approx(0, abs=1e-7), pytest.approx(-ln3))
    assert got["ppl_ratio"] == pytest.approx((1 + 1 / 3) / 2)
    assert got["chi2_token"] == pytest.approx((4 + 0.25 + 9) / 3 - 1)
    assert got["chi2_seq"] == pytest.approx((1 + 9) / 2 - 1, rel=1e-6)

    # token weights truncated at 2: 2, 1/2 | 2
    assert got["rollout_is_mean"] == pytest.approx(1.5)
    assert got["rollout_is_std"] == pytest.approx(math.sqrt((4 + 0.25 + 4) / 3 - 1.5**2))
    assert (got["rollout_is_max"], got["rollout_is_min"]) == (pytest.approx(2), pytest.approx(0.5))
    assert got["rollout_is_eff_sample_size"] == pytest.approx((2 + 0.5 + 2) ** 2 / (3 * (4 + 0.25 + 4)))
    assert got["rollout_is_seq_mean"] == pytest.approx((1.25 + 2) / 2)
    assert got["rollout_is_seq_std"] == pytest.approx(0.75 / math.sqrt(2))
    assert (got["rollout_is_seq_max"], got["rollout_is_seq_min"]) == (pytest.approx(2), pytest.approx(1.25))
    assert got["rollout_is_seq_max_deviation"] == pytest.approx(1)
    assert got["rollout_is_seq_fraction_high"] == 0.5  # 3 before truncation
    assert got["rollout_is_seq_fraction_low"] == 0.0


def test_fractions_outside_the_threshold():
    ln = math.log
    got = measure([[ln(3.0), ln(1.5), ln(0.4), ln(0.6)]], [[0.0, 0.0, 0.0, 0.0]])
    assert got["rollout_is_ratio_fraction_high"] == 0.25
    assert got["rollout_is_ratio_fraction_low"] == 0.25
    wide = measure([[ln(3.0), ln(1.5), ln(0.4), ln(0.6)]], [[0.0, 0.0, 0.0, 0.0]], rollout_is_threshold=4.0)
    assert wide["rollout_is_ratio_fraction_high"] == wide["rollout_is_ratio_fraction_low"] == 0.0
    assert wide["rollout_is_max"] == pytest.approx(3.0)


def test_sequence_weights_are_products():
    # products: 2·3 = 6 (three tokens would be more, one is padding) and 1/4
    ln = math.log
    train = [[ln(2.0), ln(3.0), ln(7.0)], [ln(0.5), ln(0.5), 0.0]]
    got = measure(train, [[0.0] * 3] * 2, [[1, 1, 0], [1, 1, 1]], rollout_is="sequence")
    assert got["rollout_is_max"] == pytest.approx(6)  # extremes are taken before truncation
    assert got["rollout_is_min"] == pytest.approx(0.25)
    assert got["rollout_is_mean"] == pytest.approx((2 * 2 + 3 * 0.25) / 5)  # one weight per token
    assert got["rollout_is_seq_mean"] == pytest.approx((2 + 0.25) / 2)
    assert got["rollout_is_ratio_fraction_high"] == got["rollout_is_ratio_fraction_low"] == 0.5
    assert got["rollout_is_eff_sample_size"] == pytest.approx(4.75**2 / (5 * (2 * 4 + 3 * 0.0625)))


def test_identical_policies_give_exact_zeros_and_ones():
    logprobs = torch.randn(4, 9)
    got = rollout_metrics(logprobs, logprobs.clone(), torch.ones(4, 9))
    zeros = ("kl", "k3_kl", "logprob_abs_diff", "log_ppl_diff", "chi2_token", "chi2_seq", "rollout_is_std")
    ones = (
        "ppl_ratio",
        "token_mult_prob_error",
        "rollout_is_mean",
        "rollout_is_eff_sample_size",
        "rollout_is_seq_mean",
    )
    assert {name: got[PREFIX + name] for name in zeros} == dict.fromkeys(zeros, 0.0)
    assert {name: got[PREFIX + name] for name in ones} == dict.fromkeys(ones, 1.0)


def test_small_differences_keep_their_digits():
    # Two bf16 engines that almost agree: float32 arithmetic would give 0 or 6e-8 for each of these.
    train = torch.full((2, 8), -1.0, dtype=torch.float32)
    rollout = train + torch.tensor([2.0**-14, -(2.0**-14)]).repeat(4)
    got = rollout_metrics(train, rollout, torch.ones(2, 8))
    assert got["rollout_corr/k3_kl"] == pytest.approx(2.0**-29, rel=1e-4)  # d²/2


def test_padding_is_ignored_whatever_it_holds():
    clean = measure([[-1.0, -2.0, 0.0]], [[-1.5, -1.75, 0.0]], [[1, 1, 0]])
    for filler in (float("nan"), float("inf"), -float("inf"), 1e30):
        assert measure([[-1.0, -2.0, filler]], [[-1.5, -1.75, filler]], [[1, 1, 0]]) == clean


def test_rows_without_a_response_do_not_count():
    with_empty = measure([[-1.0, -2.0], [-9.0, -9.0]], [[-1.5, -1.75], [0.0, 0.0]], [[1, 1], [0, 0]])
    assert with_empty == measure([[-1.0, -2.0]], [[-1.5, -1.75]])
    assert with_empty["rollout_is_seq_std"] == 0.0  # one sequence is left


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_any_mask_dtype(dtype):
    train, rollout = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -7.0]])
    got = rollout_metrics(train, rollout, torch.tensor([[1, 0]]).to(dtype))
    assert got["rollout_corr/kl"] == pytest.approx(-0.5)


def test_extreme_differences_stay_finite_where_verl_bounds_them():
    got = measure([[0.0, -50.0]], [[-50.0, 0.0]])
    assert got["kl"] == 0.0
    assert got["k3_kl"] == pytest.approx((math.expm1(50) - 50 + math.expm1(-50) + 50) / 2)  # not bounded, as in verl
    assert got["chi2_token"] == pytest.approx((math.exp(40) + math.exp(-40)) / 2 - 1)  # bounded at ±20
    assert got["rollout_is_max"] == 2.0
    assert got["rollout_is_min"] == pytest.approx(math.exp(-20))
    overflow = measure([[0.0]], [[-1000.0]])
    assert overflow["k3_kl"] == math.inf and overflow["kl"] == -1000.0


def test_gradients_are_not_recorded():
    train = torch.tensor([[-1.0]], requires_grad=True)
    assert all(type(value) is float for value in rollout_metrics(train, train.detach(), torch.ones(1, 1)).values())


def test_importance_weights_can_be_left_out():
    assert not [name for name in measure([[-1.0]], [[-1.0]], rollout_is=None) if "rollout_is" in name]


@pytest.mark.parametrize(
    ("train", "rollout", "mask", "options", "message"),
    [
        ([[0.0, 0.0]], [[0.0]], [[1, 1]], {}, r"rollout_logprobs \(1, 1\)"),
        ([0.0], [0.0], [1], {}, r"\[sequences, tokens\]"),
        ([[0.0]], [[0.0]], [[0]], {}, "selects no token"),
        ([[-1.0, float("nan")]], [[-1.0, -1.0]], [[1, 1]], {}, r"train_logprobs\[0, 1\] is nan \(1 such"),
        ([[-1.0], [-1.0]], [[-1.0], [-math.inf]], [[1], [1]], {}, r"rollout_logprobs\[1, 0\] is -inf"),
        ([[0.0]], [[0.0]], [[1]], {"rollout_is": "tokens"}, "choose 'token', 'sequence' or None"),
        ([[0.0]], [[0.0]], [[1]], {"rollout_is_threshold": 0.0}, "must be positive"),
        ([[0.0]], [[0.0]], [[1]], {"rollout_is_threshold": math.nan}, "must be positive"),
    ],
)
def test_bad_input_is_refused(train, rollout, mask, options, message):
    with pytest.raises(UserError, match=message):
        measure(train, rollout, mask, **options)


def packed_stream(codes, scales, global_scale=1.0, name="a"):
    return [
        (f"{name}.weight_packed", torch.tensor(codes, dtype=torch.uint8)),
        (f"{name}.weight_scale", torch.tensor(scales, dtype=torch.uint8).view(torch.float8_e4m3fn)),
        (f"{name}.weight_global_scale", torch.tensor([global_scale])),
        ("norm.weight", torch.randn(4)),
    ]


def test_flips_are_counted_by_code_scale_and_byte():
    tracker = FlipTracker()
    first = packed_stream([[0x12, 0x34, 0x56, 0x78]], [[56, 57]])
    assert list(tracker.watch(first)) == first
    assert tracker.rate is None  # nothing to compare with yet

    # 0x12→0x13 one code, 0x34→0x43 two codes in one byte, one scale; 1.0→2.0 changes two of four bytes
    list(tracker.watch(packed_stream([[0x13, 0x43, 0x56, 0x78]], [[56, 58]], 2.0)))
    rate = tracker.rate
    assert rate is not None
    assert (rate.codes_changed, rate.codes) == (3, 8)
    assert (rate.scales_changed, rate.scales) == (1, 2)
    assert (rate.global_scales_changed, rate.global_scales) == (1, 1)
    assert (rate.bytes_changed, rate.bytes) == (2 + 1 + 2, 4 + 2 + 4)
    assert rate.fractions() == {
        "flips/codes": 3 / 8,
        "flips/scales": 1 / 2,
        "flips/global_scales": 1.0,
        "flips/bytes": 1 / 2,
    }

    # compared with the last stream, not the first
    list(tracker.watch(packed_stream([[0x13, 0x43, 0x56, 0x78]], [[56, 58]], 2.0)))
    assert tracker.rate is not None and set(tracker.rate.fractions().values()) == {0.0}


def test_flips_do_not_depend_on_chunks_and_keep_no_reference(monkeypatch):
    monkeypatch.setattr("nvfp4_qat.metrics.CHUNK_BYTES", 4)
    tracker = FlipTracker()
    codes = torch.randint(0, 256, (3, 7), dtype=torch.uint8)
    list(tracker.watch([("x.weight_packed", codes)]))
    codes ^= 0x01  # the producer reuses its buffer: the tracker must have kept its own copy
    list(tracker.watch([("x.weight_packed", codes)]))
    assert tracker.rate is not None
    assert (tracker.rate.codes_changed, tracker.rate.bytes_changed) == (21, 21)


def test_a_stream_without_packed_tensors_has_no_rate():
    tracker = FlipTracker()
    for _ in range(2):
        list(tracker.watch([("model.weight", torch.ones(2))]))
    assert tracker.rate is None


def test_another_model_is_refused():
    def started():
        tracker = FlipTracker()
        list(tracker.watch(packed_stream([[1, 2]], [[56]])))
        return tracker

    with pytest.raises(UserError, match=r"a.weight_packed had 2 bytes, not 3"):
        list(started().watch(packed_stream([[1, 2, 3]], [[56]])))
    with pytest.raises(UserError, match=r"b.weight_packed was not in the last sync"):
        list(started().watch(packed_stream([[1, 2]], [[56]], name="b")))
    with pytest.raises(UserError, match=r"3 packed tensors of the last sync are missing, first a.weight_global_scale"):
        list(started().watch([]))


def test_tracker_continues_from_saved_state(tmp_path):
    tracker = FlipTracker()
    list(tracker.watch(packed_stream([[0x00]], [[56]])))
    torch.save(tracker.state_dict(), tmp_path / "flips.pt")
    resumed = FlipTracker()
    resumed.load_state_dict(torch.load(tmp_path / "flips.pt"))
    list(resumed.watch(packed_stream([[0x10]], [[56]])))
    assert resumed.rate is not None and resumed.rate.codes_changed == 1
