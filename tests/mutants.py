"""Tests that can fail: each classic mistake, made in a copy of the source, turns a named test red.

    python tests/mutants.py            the table; exit code 1 if a mutant survives
    python tests/mutants.py tied       only the mutants whose line contains "tied"

A mutant is one replacement in one module: what a student (or we, some day) would write. `old` must
occur exactly once, so that a refactoring which moves it is noticed here; the named test must pass
on the source as it is, and fail, not just break, on the mutant. Each mutant gets a copy of its own.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2
IMPORTED_ONCE = ["torch", "transformers.models.llama.modeling_llama", "hypothesis", "pytest"]

ONE_PASS = "        if self.one_pass:\n            rows"
LAST_LINE = "perturb_parameters(theta, -lr * g, seed, masks)"
UPDATE = "        with self._open(seed):\n            number"
CLEAN_UP = """        try:
            yield
        finally:
            self._seed, self._sign, self._drawn = None, None, {}
"""
IN_PLACE = """        if True:
            found = []
            for a in (self.eps, -2 * self.eps):
                self.update(seed, a)
                found.append(loss_fn(self.model(**inputs, use_cache=False).logits))
            self.update(seed, self.eps)
            for p in self.weights:
                p.used = True
            return tuple(found)
"""

RESUMED = "test_durability::test_a_stopped_run_ends_as_if_it_had_not_been_stopped"

# fmt: off
MUTANTS = [  # (what a student writes, module, old, new, the test that turns red)
    # ------------------------------------------------------------ Algorithms 1 and 2, the noise
    ("the update goes uphill", "zo",
     LAST_LINE, "perturb_parameters(theta, lr * g, seed, masks)",
     "test_zo::test_a_step_goes_downhill"),
    ("noise redrawn for the update", "zo",
     LAST_LINE, "perturb_parameters(theta, -lr * g, seed + 1, masks)",
     "test_theorems::test_algorithm_1_is_its_parts"),
    ("the update forgets the mask", "zo",
     LAST_LINE, "perturb_parameters(theta, -lr * g, seed, [m | True for m in masks])",
     "test_theorems::test_algorithm_1_is_its_parts"),
    ("mask of the second probe from θ + ε ẑ", "zo",
     "perturb_parameters(theta, -2 * eps, seed, masks)",
     "perturb_parameters(theta, -2 * eps, seed, get_masks(theta))",
     "test_zo::test_the_masks_are_taken_once_from_unperturbed_weights"),
    ("mask of the update from θ after the probes", "zo",
     LAST_LINE, "perturb_parameters(theta, -lr * g, seed, get_masks(theta))",
     "test_zo::test_the_masks_are_taken_once_from_unperturbed_weights"),
    ("−2ε written as −ε", "zo",
     "perturb_parameters(theta, -2 * eps, seed, masks)",
     "perturb_parameters(theta, -eps, seed, masks)",
     "test_theorems::test_step_is_algorithm_1"),
    ("θ not restored before the update", "zo",
     "    perturb_parameters(theta, eps, seed, masks)\n    g =", "    g =",
     "test_theorems::test_step_is_algorithm_1"),
    ("2ε written as ε in eq. 2", "zo",
     "(loss_plus - loss_minus) / (2 * eps)", "(loss_plus - loss_minus) / eps",
     "test_theorems::test_two_points_see_the_slope"),
    ("l⁻ − l⁺ in eq. 2", "zo",
     "(loss_plus - loss_minus) / (2 * eps)", "(loss_minus - loss_plus) / (2 * eps)",
     "test_theorems::test_lemma_1"),
    ("probes forget the mask: d directions, not k", "zo",
     "a * (mask * z.to(wide))", "a * z.to(wide)",
     "test_theorems::test_second_moment"),
    ("one noise stream for all tensors", "zo",
     "z_i = gaussian(seed, stream, ", "z_i = gaussian(seed, 0, ",
     "test_theorems::test_algorithm_2_adds_its_own_noise_to_every_tensor"),
    ("noise from the global generator", "zo",
     "z_i = gaussian(seed, stream, theta_i.shape, device=theta_i.device)",
     "z_i = torch.randn(theta_i.shape, device=theta_i.device)",
     "test_theorems::test_algorithm_2_adds_its_own_noise_to_every_tensor"),
    ("Box-Muller without its 2", "zo",
     "torch.sqrt(-2.0 * ", "torch.sqrt(-1.0 * ",
     "test_theorems::test_lemma_1"),
    ("uniform noise in place of normal, same variance", "zo",
     "return radius * torch.cos(angle), radius * torch.sin(angle)",
     "return ((word0.float() * 2**-32 - 0.5) * 12**0.5, (word1.float() * 2**-32 - 0.5) * 12**0.5)",
     "test_theorems::test_second_moment"),
    ("seeds cut to 32 bits", "zo",
     "seed >> 32 << 16 | stream", "stream",
     "test_zo::test_neighbouring_seeds_and_streams_are_independent"),
    ("seed + step: runs share their noise", "zo",
     "return int(run_seed) << 24 | int(step)", "return run_seed + step",
     "test_zo::test_step_seeds_are_one_to_one"),
    ("the same noise in every chunk", "sweep",
     ".view(-1, HALF) + (start >> 1)", ".view(-1, HALF)",
     "test_sweep::test_the_eager_kernel_is_the_primitive_in_chunks"),
    ("16-bit weights updated in 16 bits", "zo",
     "wide = torch.promote_types(theta.dtype, torch.float32)", "wide = theta.dtype",
     "test_zo::test_perturb_parameters_is_algorithm_2"),
    # ------------------------------------------------------------ Algorithm 3, the masks
    ("θ ≤ h, the absolute value forgotten", "masks",
     "return theta.abs() <= h", "return theta <= h",
     "test_theorems::test_algorithm_3_selects_the_smallest"),
    ("sparsity read as density", "masks",
     "round(density * magnitude.numel())", "round((1 - density) * magnitude.numel())",
     "test_masks::test_small_weights_move_not_large_ones"),
    ("random mask: a normal draw below the density", "masks",
     "zo.random_words(seed, stream, index)[0] < bound",
     "zo.normal(index, *zo.random_words(seed, stream, index)) < bound * 2**-32",
     "test_masks::test_the_random_mask_has_the_density_asked_for"),
    ("packed mask: bits in the other order", "masks",
     "(state[index >> 3] >> (index & 7) & 1)", "(state[index >> 3] >> (7 - (index & 7)) & 1)",
     "test_masks::test_packed_bits_are_the_constant_mask"),
    ("k counted from 0", "masks",
     "torch.searchsorted(counts.cumsum(0), k)", "torch.searchsorted(counts.cumsum(0), k + 1)",
     "test_sensitive::test_the_kth_smallest_is_that_of_the_sorted_values"),
    # ------------------------------------------------------------ §3.3, the patched forward
    ("±ε in place, then restored", "model_patch",
     ONE_PASS, IN_PLACE + ONE_PASS,
     "test_model_patch::test_weights_keep_their_bits_through_100_probes"),
    ("both probes at θ + ε ẑ", "model_patch",
     "self._on_devices(-self.eps)", "self._on_devices(self.eps)",
     "test_model_patch::test_one_pass_equals_the_literal_algorithm_1[llama]"),
    ("ε kept by the probes, changed in the slope", "model_patch",
     "self._on_devices(self.eps), self._on_devices(-self.eps)",
     "self._on_devices(1e-3), self._on_devices(-1e-3)",
     "test_model_patch::test_eps_can_be_changed_between_steps"),
    ("a copy of the model follows the original", "model_patch",
     "if me is not module:", "if False:",
     "test_model_patch::test_a_copy_of_a_patched_model_is_a_model_of_its_own"),
    ("both probes read the first half of the batch", "model_patch",
     "return value.tensor_split(2)[i]", "return value.tensor_split(2)[0]",
     "test_model_patch::test_one_pass_equals_the_literal_algorithm_1[llama]"),
    ("tied head perturbed once", "model_patch",
     "for name, p in own if id(p) in found}",
     'for name, p in own if id(p) in found and module is not getattr(model, "lm_head", None)}',
     "test_model_patch::test_tied_weights_are_perturbed_alike"),
    ("tied weights numbered twice", "moving",
     "enumerate(model.named_parameters())",
     "enumerate(model.named_parameters(remove_duplicate=False))",
     "test_model_patch::test_tied_weights_are_perturbed_alike"),
    ("one noise stream for equal shapes", "moving",
     "number = torch.tensor(stream, device=weight.device)",
     "number = torch.tensor(weight.numel() % 1000, device=weight.device)",
     "test_model_patch::test_equal_shapes_have_noise_of_their_own"),
    ("noise redrawn for the update", "model_patch",
     UPDATE, UPDATE.replace("seed", "seed + 1"),
     "test_model_patch::test_probe_and_update_use_the_same_noise_and_mask"),
    ("η g rounded to 16 bits", "model_patch",
     "number = self._on_devices(a)", "number = self._on_devices(a, self.moving[0].flat.dtype)",
     "test_model_patch::test_half_precision_is_computed_in_fp32_and_rounded_once"),
    ("an embedding's noise by token, not by element", "model_patch",
     "input[..., None] * columns + torch.arange", "input[..., None] + torch.arange",
     "test_model_patch::test_one_pass_equals_the_literal_algorithm_1[llama]"),
    ("dropout left on", "moving",
     "        if module.training:", "        if False:",
     "test_model_patch::test_training_mode_is_refused"),
    ("a probe left open after an error", "model_patch",
     CLEAN_UP, "        yield\n        self._seed, self._sign, self._drawn = None, None, {}\n",
     "test_model_patch::test_an_exception_inside_a_probe_leaves_an_ordinary_model"),
    ("an unused weight moved by pure noise, in silence", "model_patch",
     "if not p.used]:", "if p.used is None]:",
     "test_model_patch::test_a_parameter_that_forward_never_used_is_named"),
    ("the threshold re-taken at every step", "model_patch",
     "if step and p.rule.refresh_every and step % p.rule.refresh_every == 0:", "if True:",
     "test_model_patch::test_the_threshold_stays_or_is_refreshed"),
    # ------------------------------------------------------------ prompts, batches, losses
    ("padding on the right", "scoring",
     "[[pad] * (T - len(r)) + r for r in rows]", "[r + [pad] * (T - len(r)) for r in rows]",
     "test_tasks::test_layout_of_a_batch"),
    ("positions that count the padding", "scoring",
     "(mask.cumsum(1) - 1).clamp(min=0)", "torch.arange(T).expand(ids.shape).clone()",
     "test_tasks::test_layout_of_a_batch"),
    ("loss in the logits' fp16", "scoring",
     "[batch.row, batch.position].float()", "[batch.row, batch.position]",
     "test_tasks::test_half_logits_make_an_fp32_loss"),
    ("an option's score summed, not averaged", "scoring",
     "1 / length.float()", "torch.ones(len(length))",
     "test_tasks::test_the_score_is_a_mean_not_a_sum"),
    ("LM loss over all options, wrong ones too", "scoring",
     "== batch.labels[batch.slot // batch.num_options]", ">= 0",
     "test_tasks::test_losses_are_mezos"),
    ("No and Yes in the wrong order", "tasks",
     '_NO_YES = ("No", "Yes")', '_NO_YES = ("Yes", "No")',
     "test_tasks::test_prompts_are_mezos_to_the_character"),
    ("validation from the front of the draw", "tasks",
     "train, validation = drawn[:cut], drawn[cut:]",
     "train, validation = drawn[-cut:], drawn[:-cut]",
     "test_tasks::test_split_is_mezos"),
    ("every epoch in the same order", "tasks",
     "np.random.RandomState([seed, epoch])", "np.random.RandomState(seed)",
     "test_tasks::test_epochs_and_seeds_differ"),
    # ------------------------------------------------------------ the loop and its log
    ("the loop goes uphill", "train",
     "np.float32(-config.lr * projected_grad)", "np.float32(config.lr * projected_grad)",
     "test_train::test_the_log_is_minus_lr_times_proj_grad_and_a_fresh_seed"),
    ("the same noise at every step", "train",
     "zo.step_seed(config.seed, t)", "zo.step_seed(config.seed, 0)",
     "test_train::test_the_log_is_minus_lr_times_proj_grad_and_a_fresh_seed"),
    ("a NaN loss applied", "train",
     "            if math.isfinite(a):", "            if True:",
     "test_train::test_a_loss_that_is_not_finite_never_touches_the_weights"),
    ("replay forgets to refresh the thresholds", "eval",
     "        handle.refresh(step)\n", "",
     "test_train::test_the_log_rebuilds_the_last_weights_to_the_bit"),
    # ------------------------------------------------------------ [Q]'s masks
    ("squares taken in the gradient's dtype", "sensitivity",
     "g = gradient.to(scores[name].device, torch.float32)\n        scores[name].addcmul_(g, g)",
     "g = gradient.to(scores[name].device)\n        scores[name].add_(g * g)",
     "test_sensitive::test_squares_are_fp32_where_fp16_would_underflow"),
    ("largest: indices negated, not magnitudes", "sensitivity",
     "name: top(weights[name].abs(), k)",
     "name: (-top(weights[name].abs(), k) % weights[name].numel()).sort().values.int()",
     "test_sensitive::test_largest_and_smallest_rank_values_not_places"),
    ("top-k over all matrices, not per matrix", "sensitivity",
     "    return {name: top(scores[name], k) for name, k in how_many(scores, density).items()}",
     "    flat = torch.cat([s.flatten() for s in scores.values()])\n"
     "    h = flat.kthvalue(flat.numel() - round(density * flat.numel()) + 1).values\n"
     "    return {n: (s.flatten() >= h).nonzero().flatten().int() for n, s in scores.items()}",
     "test_sensitive::test_ranking_is_per_matrix"),
    ("ties taken whole: more than k", "sensitivity",
     "equal[: k - len(above)]", "equal",
     "test_sensitive::test_top_is_exactly_k_also_where_values_tie"),
    ("scored in train mode, with dropout", "sensitivity",
     "        model.eval()\n", "        model.train()\n",
     "test_sensitive::test_fisher_is_brute_force_autograd"),
    # ------------------------------------------------------------ quant.py and [Q]'s layers
    ("sensitive weights quantised with the rest", "quant",
     "        dense[index] = 0\n", "",
     "test_quant::test_dense_plus_sparse_is_w_at_the_sensitive_places"),
    ("the sparse values kept in 16 bits", "quant",
     "dense[index].float()", "dense[index]",
     "test_runs_of_q::test_sixteen_bits"),
    ("packed row by row, as bitsandbytes' CPU kernel gets wrong", "quant",
     "dense.view(-1, BLOCK)", "dense.view_as(weight)",
     "test_quant::test_blocks_that_straddle_rows_are_unpacked_rightly"),
    ("the 16-bit places left as the last probe wrote them", "model_patch",
     "                few.settle()\n", "                pass\n",
     "test_quant::test_probes_change_nothing_and_updates_the_values_alone"),
    ("both probes at value + ε z", "model_patch",
     "self._drawn[p.whole][sign < 0]",
     "self._drawn[p.whole][0]",
     "test_quant::test_both_halves_equal_plain_models_with_the_weights_written_out"),
    ("one noise stream for all matrices of [Q]", "moving",
     "[p.stream for p in few]", "[0 for p in few]",
     "test_quant::test_the_16_bit_method_equals_the_literal_step_on_the_same_index"),
    ("noise by place in the list, not in the matrix", "moving",
     "torch.cat([p.index for p in few])", "torch.cat([torch.arange(len(p.index)) for p in few])",
     "test_quant::test_the_16_bit_method_equals_the_literal_step_on_the_same_index"),
    # ------------------------------------------------------------ rounding
    ("rounded up with a fixed probability", "sweep",
     "(random >> (16 - cut))", "((random & 1) << cut)",
     "test_sweep::test_stochastic_rounding_is_unbiased"),
    ("a small tensor's kernel, on one thread for ever", "sweep",
     '"cpp.dynamic_threads": True', '"cpp.dynamic_threads": False',
     "test_sweep::test_a_kernel_compiled_for_few_weights_runs_on_all_threads"),
    ("the rounding sees the noise", "sweep",
     "random = ((high & 0xFF) << 8 | low & 0xFF).int()",
     "random = (high >> 16).int()",
     "test_sweep::test_stochastic_rounding_does_not_see_the_noise"),
    ("the two elements of a draw get the same normal", "zo",
     "return radius * torch.cos(angle), radius * torch.sin(angle)",
     "return radius * torch.cos(angle), radius * torch.cos(angle)",
     "test_zo::test_the_two_elements_of_a_draw_are_independent"),
    # ------------------------------------------------------------ logs, resume, workers
    ("a skipped step replayed as an update", "eval",
     "        if math.isfinite(a):  # else it was skipped", "        if True:",
     "test_durability::test_a_loss_that_overflows_is_skipped_also_when_resumed[nan]"),
    ("a torn last line of the log believed", "steplog",
     "enumerate(lines[:-1]):\n        try:\n            step, seed",
     "enumerate(filter(None, lines)):\n        try:\n            step, seed",
     RESUMED + "[a torn last step]"),
    ("NaN answers with the first option", "scoring",
     "(scores.argmax(1) == batch.labels) & finite", "scores.argmax(1) == batch.labels",
     "test_tasks::test_a_score_that_is_not_finite_is_no_right_answer"),
    ("the lock of a directory that is gone", "record",
     "if not os.path.samestat(os.fstat(held), run.stat()):", "if False:",
     "test_train::test_a_directory_that_goes_away_meanwhile_is_made_again"),
    ("the step log rounded to four digits", "steplog",
     '",".join(map(repr, step))', '",".join(f"{x:.4g}" for x in step)',
     "test_train::test_the_log_rebuilds_the_last_weights_to_the_bit"),
    ("best step off by one", "steplog",
     "self.best_step = accuracy, self.steps", "self.best_step = accuracy, self.steps - 1",
     "test_train::test_the_best_step_is_chosen_by_validation_accuracy"),
    ("the best step forgotten by a resume", "steplog",
     "                    self._close_line()\n", "                    self.line = {}\n",
     RESUMED + "[nothing]"),
    ("a step without its metrics counted", "steplog",
     "            steps = steps[: due[kept] - 1]\n", "",
     RESUMED + "[a last step without its metrics]"),
    ("an edited log replayed", "steplog",
     "if repr(found) != repr(expected):", "if expected is None:",
     "test_durability::test_bad_luck_is_one_line_and_changes_nothing[an update edited]"),
    ("a snapshot outlives the steps it was taken after", "record",
     "if step > steps:", "if step < 0:",
     "test_durability::test_snapshots_of_a_log_that_was_cut_go"),
    ("a mask beside --out taken for a leftover", "record",
     'return names <= {"config.json.tmp"}', "return names <= set(EARLY)",
     "test_runs_of_q::test_a_mask_that_was_made_survives_a_start_that_fails"),
    ("any snapshot believed", "snapshot",
     "if about != _about(step, tensors, settings, device):", "if False:",
     RESUMED + "[a snapshot of another step]"),
    ("micro-batches of any size counted alike", "train",
     'count = part.num_examples if part.score == "all" else len(part.token)', "count = 1",
     "test_workers::test_micro_batches_are_the_whole_batch_to_rounding[3-classification]"),
    ("right tokens counted as examples", "train",
     'count = part.num_examples if part.score == "all" else len(part.token)',
     "count = part.num_examples",
     "test_workers::test_micro_batches_are_the_whole_batch_to_rounding[3-language modelling]"),
    ("each worker follows its own losses", "train",
     "    plus, minus, weight = group.sum([plus, minus, weight])\n", "",
     "test_workers::test_workers_are_the_run_of_one_to_rounding[2]"),
    ("a rule whose mask follows the weights is counted once", "masks",
     "    static = False  #", "    static = True  #",
     "test_model_patch::test_a_rule_of_ones_own_is_counted_again_every_time"),
    ("two processes write one log", "record",
     "        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "        pass\n",
     "test_durability::test_a_run_that_is_running_is_left_alone"),
    ("a digest that does not see the order", "snapshot",
     "(place * -0x61C8864680B583EB | 1)", "1",
     "test_durability::test_a_digest_changes_with_any_bit_and_any_order"),
]
# fmt: on


def run_tests(copy: Path, tests) -> tuple[int, str]:
    """pytest's exit code on `tests` (0 passed, 1 failed, else broken), and its last line."""
    import pytest

    os.chdir(copy)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars, in this process alone
    nodes = ["tests/{}.py::{}".format(*test.split("::")) for test in tests]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *nodes]))
    os.chdir(ROOT)
    return code, (output.getvalue().strip().splitlines() or ["no output"])[-1]


def verdict(mutant, tests) -> str:
    """What became of one mutant: "killed", or what is wrong. Without a mutant: passed, or what."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)  # the modules and tests; no killing test needs the models
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__*"))
        for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
            shutil.copy(path, copy)
        if mutant:
            _, module, old, new, _ = mutant
            source = copy / f"{module}.py"
            text = source.read_text(encoding="utf-8")
            if text.count(old) != 1:
                return f"DOES NOT APPLY: {old!r} occurs {text.count(old)} times"
            source.write_text(text.replace(old, new), encoding="utf-8")
        code, last = run_tests(copy, tests)
    expected = {0: "SURVIVED", 1: "killed"} if mutant else {0: "passed"}
    return expected.get(code, f"BROKEN, pytest's exit code {code}: {last}")


def main() -> int:
    began, wanted = time.perf_counter(), " ".join(sys.argv[1:])
    mutants = [m for m in MUTANTS if wanted in " ".join(m)]
    os.environ |= {"OMP_NUM_THREADS": "1"}
    context = get_context("forkserver")  # every test run is a fork of one that has imported torch
    context.set_forkserver_preload(IMPORTED_ONCE)
    bad = 0
    with ProcessPoolExecutor(WORKERS, mp_context=context, max_tasks_per_child=1) as pool:
        original = pool.submit(verdict, None, sorted({m[-1] for m in mutants}))
        found = [pool.submit(verdict, m, [m[-1]]) for m in mutants]
        print(f"{'mutant':<50} {'module':<12} killed by", flush=True)
        for mutant, answer in zip(mutants, found, strict=True):
            survived = answer.result() != "killed"
            bad += survived
            by = f"{answer.result()} ({mutant[-1]})" if survived else mutant[-1]
            print(f"{mutant[0]:<50} {mutant[1]:<12} {by}", flush=True)
    if original.result() != "passed":
        print(f"these tests should pass on the source as it is: {original.result()}")
    minutes = (time.perf_counter() - began) / 60
    print(f"{len(mutants) - bad} of {len(mutants)} mutants killed in {minutes:.1f} minutes")
    return int(bad > 0 or original.result() != "passed")


if __name__ == "__main__":
    sys.exit(main())
