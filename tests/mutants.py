"""Tests that can fail: each classic mistake, made in a copy of the source, turns a named test red.

    python -m tests.mutants            the table; exit code 1 if a mutant survives
    python -m tests.mutants tied       only the mutants whose line contains "tied"

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

CURVE = "a loss curve shows it"  # and so labs/09_find_the_bug.py may draw it
LAST_LINE = "perturb_parameters(theta, -lr * g, seed, masks)"
PROBES = """        losses = []
        for a in (+self.eps, -self.eps):
            with self.probe(seed, a):
                losses.append(own_number(loss_fn(self.model, batch)))
"""
IN_PLACE = """        losses = []
        for a in (self.eps, -2 * self.eps):
            self.update(seed, a)
            losses.append(loss_fn(self.model, batch))
        self.update(seed, self.eps)
        return losses
"""

# fmt: off
MUTANTS = [  # (what a student writes, module, old, new, the test that turns red, CURVE or nothing)
    # ------------------------------------------------------------ Algorithms 1 and 2, the noise
    ("the update goes uphill", "zo",
     LAST_LINE, "perturb_parameters(theta, lr * g, seed, masks)",
     "test_zo::test_a_step_goes_downhill", CURVE),
    ("noise redrawn for the update", "zo",
     LAST_LINE, "perturb_parameters(theta, -lr * g, seed + 1, masks)",
     "test_theorems::test_algorithm_1_is_its_parts", CURVE),
    ("the update forgets the mask", "zo",
     LAST_LINE, "perturb_parameters(theta, -lr * g, seed, [m | True for m in masks])",
     "test_theorems::test_algorithm_1_is_its_parts", CURVE),
    ("mask of the second probe from θ + ε ẑ", "zo",
     "perturb_parameters(theta, -2 * eps, seed, masks)",
     "perturb_parameters(theta, -2 * eps, seed, get_masks(theta))",
     "test_zo::test_the_masks_are_taken_once_from_unperturbed_weights", CURVE),
    ("mask of the update from θ after the probes", "zo",
     LAST_LINE, "perturb_parameters(theta, -lr * g, seed, get_masks(theta))",
     "test_zo::test_the_masks_are_taken_once_from_unperturbed_weights"),
    ("−2ε written as −ε", "zo",
     "perturb_parameters(theta, -2 * eps, seed, masks)",
     "perturb_parameters(theta, -eps, seed, masks)",
     "test_theorems::test_step_is_algorithm_1", CURVE),
    ("θ not restored before the update", "zo",
     "    perturb_parameters(theta, eps, seed, masks)\n    g =", "    g =",
     "test_theorems::test_step_is_algorithm_1", CURVE),
    ("2ε written as ε in eq. 2", "zo",
     "(loss_plus - loss_minus) / (2 * eps)", "(loss_plus - loss_minus) / eps",
     "test_theorems::test_two_points_see_the_slope", CURVE),
    ("l⁻ − l⁺ in eq. 2", "zo",
     "(loss_plus - loss_minus) / (2 * eps)", "(loss_minus - loss_plus) / (2 * eps)",
     "test_theorems::test_lemma_1", CURVE),
    ("probes forget the mask: d directions, not k", "zo",
     "a * (mask * z.to(wide))", "a * z.to(wide)",
     "test_theorems::test_second_moment", CURVE),
    ("one noise stream for all tensors", "zo",
     "z_i = gaussian(seed, stream, ", "z_i = gaussian(seed, 0, ",
     "test_theorems::test_algorithm_2_adds_its_own_noise_to_every_tensor", CURVE),
    ("noise from the global generator", "zo",
     "z_i = gaussian(seed, stream, theta_i.shape, device=theta_i.device)",
     "z_i = torch.randn(theta_i.shape, device=theta_i.device)",
     "test_theorems::test_algorithm_2_adds_its_own_noise_to_every_tensor", CURVE),
    ("Box-Muller without its 2", "zo",
     "radius = x * x.rsqrt()", "radius = (x / 2) * (x / 2).rsqrt()",
     "test_theorems::test_lemma_1", CURVE),
    ("a rotation by one too few", "zo",
     "turn = ROTATIONS[i % 8]", "turn = ROTATIONS[i % 8] - 1",
     "test_zo::test_threefry_gives_random123s_known_answers"),
    ("a shift that drags the sign along", "zo",
     " & ((1 << turn) - 1)\n", "\n",
     "test_zo::test_threefry_gives_random123s_known_answers"),
    ("seeds cut to 32 bits", "zo",
     "return word(seed >> 32), word(seed)", "return word(0), word(seed)",
     "test_zo::test_neighbouring_seeds_and_streams_are_independent"),
    ("seed + step: runs share their noise", "zo",
     "return int(run_seed) << 32 | int(step)", "return run_seed + step",
     "test_zo::test_step_seeds_are_one_to_one"),
    ("both signs from one bit", "zo",
     "radius * signed(sine, word1 << 1)", "radius * signed(sine, word1)",
     "test_zo::test_the_two_elements_of_a_draw_are_independent"),
    ("the two elements of a draw get the same normal", "zo",
     "radius * signed(sine, word1 << 1)", "radius * signed(cosine, word1)",
     "test_zo::test_the_two_elements_of_a_draw_are_independent"),
    ("the same noise in every chunk", "zo",
     "draw = draw.view(thetas[0].shape) + start", "draw = draw.view(thetas[0].shape)",
     "test_zo::test_the_eager_loop_is_the_primitive_in_chunks"),
    ("16-bit weights updated in 16 bits", "zo",
     "wide = torch.promote_types(theta.dtype, torch.float32)", "wide = theta.dtype",
     "test_zo::test_perturb_parameters_is_algorithm_2"),
    ("rounded up with a fixed probability", "zo",
     "(random >> (16 - cut))", "((random & 1) << cut)",
     "test_zo::test_stochastic_rounding_is_unbiased"),
    ("the rounding sees the noise", "zo",
     "random = (word0 & 0xFF) << 8 | word1 & 0xFF",
     "random = word0 >> 15 & 0xFFFF",
     "test_zo::test_stochastic_rounding_does_not_see_the_noise"),
    # ------------------------------------------------------------ Algorithm 3, the masks
    ("θ ≤ h, the absolute value forgotten", "masks",
     "return theta.abs() <= h", "return theta <= h",
     "test_theorems::test_algorithm_3_selects_the_smallest", CURVE),
    ("sparsity read as density", "masks",
     "round(check_density(density) * magnitude.numel())",
     "round((1 - check_density(density)) * magnitude.numel())",
     "test_masks::test_small_weights_move_not_large_ones", CURVE),
    ("random mask: a normal draw below the density", "masks",
     "return zo.threefry(element, stream, seed, stream)[0] < bound",
     "z = zo.normal_pair(*zo.threefry(element, stream, seed, stream))[0]\n"
     "        return z < (bound + 2**31) / 2**32",
     "test_masks::test_the_random_mask_has_the_density_asked_for", CURVE),
    ("packed mask: bits in the other order", "masks",
     "(state[element >> 3] >> (element & 7) & 1)",
     "(state[element >> 3] >> (7 - (element & 7)) & 1)",
     "test_masks::test_packed_bits_are_the_constant_mask"),
    ("h of a constant mask taken again, too", "masks",
     "weight.detach().flatten(), self.h[stream]", "weight.flatten(), threshold(weight, 0.3)",
     "test_model_patch::test_a_constant_mask_stays_or_is_taken_again_by_the_same_threshold"),
    ("two models with one rule share their thresholds", "model_patch",
     "copy(what_moves)", "what_moves",
     "test_model_patch::test_models_that_share_a_rule_have_thresholds_of_their_own"),
    ("k counted from 0", "masks",
     "torch.searchsorted(ends, k)", "torch.searchsorted(ends, k + 1)",
     "test_masks::test_the_kth_smallest_is_that_of_the_sorted_values"),
    ("a compiled loop for every size", "zo",
     "size if few or size < 2 else None", "size",
     "test_masks::test_compiled_masks_are_the_rules_own[ConstantMask]"),
    # ------------------------------------------------------------ §3.3, a weight reads as θ + ε ẑ
    ("±ε in place, then restored", "model_patch",
     PROBES, IN_PLACE,
     "test_model_patch::test_weights_keep_their_bits_through_100_probes"),
    ("both probes at θ + ε ẑ", "model_patch",
     "for a in (+self.eps, -self.eps):", "for a in (+self.eps, +self.eps):",
     "test_model_patch::test_a_step_equals_the_literal_algorithm_1", CURVE),
    ("tied head perturbed once", "model_patch",
     "for module, name in weight.owners:", "for module, name in weight.owners[:1]:",
     "test_model_patch::test_tied_weights_move_once_and_stay_tied"),
    ("one noise stream for equal shapes", "model_patch",
     "self.word = zo.word(stream)",
     "self.word = zo.word(theta.numel() % 1000)",
     "test_model_patch::test_a_step_equals_the_literal_algorithm_1", CURVE),
    ("noise redrawn for the update", "model_patch",
     "        shift = zo.Shift.of(a, seed)\n        for weight",
     "        shift = zo.Shift.of(a, seed + 1)\n        for weight",
     "test_model_patch::test_probe_and_update_use_the_same_noise_and_mask", CURVE),
    ("dropout left on", "model_patch",
     "if any(module.training for module in model.modules()):", "if False:",
     "test_model_patch::test_the_modes_and_models_that_cannot_be_patched_are_refused"),
    ("a probe left open after an error", "model_patch",
     "        try:\n            yield\n        finally:\n            self.shift,",
     "        yield\n        if True:\n            self.shift,",
     "test_model_patch::test_an_exception_inside_a_probe_leaves_an_ordinary_model"),
    ("an unread weight moved by pure noise, in silence", "model_patch",
     "if not part.was_read]:", "if part.was_read is None]:",
     "test_model_patch::test_weights_that_cannot_move_are_refused_by_name"),
    ("the threshold taken again at every step", "model_patch",
     "step % self.rule.refresh_every == 0:", "True:",
     "test_model_patch::test_the_threshold_stays_or_is_refreshed"),
    ("a group by magnitude with all smaller weights, too", "masks",
     "return (theta.abs() > state[0]) & get_mask", "return get_mask",
     "test_masks::test_groups_by_magnitude_share_out_the_weights"),
    ("a mask file that holds other matrices, too", "harness.mask",
     "if set(tensors) not in", "if False and set(tensors) not in",
     "test_mask_command::test_a_file_that_is_no_mask_is_refused_in_one_line[extra]"),
    ("two parameters in one memory moved one after the other", "model_patch",
     "starts[p.data_ptr()] > 1:", "starts[p.data_ptr()] > 9:",
     "test_model_patch::test_two_parameters_in_one_memory_are_refused"),
    ("autocast's casts of the weights before the update read on", "model_patch",
     "        torch.clear_autocast_cache()", "        pass",
     "test_model_patch::test_a_loop_inside_autocast_sees_its_updates"),
    ("scratch handed out while somebody holds it", "model_patch",
     "if buffer.fits(like) and buffer.is_free():", "if buffer.fits(like):",
     "test_model_patch::test_weights_that_are_alive_at_once_share_no_memory", CURVE),
    ("a copy of the layer before kept for this one", "model_patch",
     "if self.layer != patch.reading:", "if False:",
     "test_model_patch::test_copies_do_not_pile_up"),
    ("a tied weight drawn again for its second layer", "model_patch",
     "if w.owners[1:]}", "if w.owners[9:]}",
     "test_model_patch::test_a_probe_draws_every_weight_once"),
    ("a tied weight's second layer not looked at before the first is changed", "quant",
     "for module, attribute in owners:", "for module, attribute in owners[:1]:",
     "test_model_patch::test_a_tied_weight_that_one_layer_reads_in_another_way_is_left_alone"),
    ("an error of a rule hidden, as nn.Module then answers with θ", "quant",
     "except AttributeError as error:", "except ZeroDivisionError as error:",
     "test_model_patch::test_an_error_of_a_rule_is_not_hidden"),
    # ------------------------------------------------------------ prompts, batches, losses
    ("padding on the right", "tasks",
     "ids.append(tokens[:1] * free + tokens)", "ids.append(tokens + tokens[:1] * free)",
     "test_tasks::test_layout_of_a_batch"),
    ("positions that count the padding", "tasks",
     "[0] * free + [i for text in row for i in range(len(texts[text]))]", "list(range(T))",
     "test_tasks::test_layout_of_a_batch"),
    ("texts in a row that read the ones before", "tasks",
     "text[:, :, None] == text[:, None, :]", "text[:, :, None] >= text[:, None, :]",
     "test_tasks::test_scores_are_mezos[opt]"),
    ("texts that share rows longer than a window", "tasks",
     "if pack < T else", "if not pack else",
     "test_tasks::test_no_row_is_shared_beyond_what_a_model_bears"),
    ("long rows whose logits are a product per row", "tasks",
     "if pack:  # also", "if T <= pack:  # also",
     "test_tasks::test_no_row_is_shared_beyond_what_a_model_bears"),
    ("texts out of order where none shares a row", "tasks",
     "return sorted(rows)", "return rows",
     "test_tasks::test_no_row_is_shared_beyond_what_a_model_bears"),
    ("rows shared where a text reads the others", "harness.loading",
     "leak <= rounding / 1000 and shift <= rounding", "True",
     "test_tasks::test_a_model_says_whether_texts_may_share_its_rows[mistral-0-dtype0]"),
    ("logits of all places taken for those that are kept", "tasks",
     "if K < T else (T, place)", "if K else (T, place)",
     "test_tasks::test_places_of_shared_rows_are_read_from_few_logits_or_all[8]"),
    ("a mask that eager attention adds as 0 and 1", "tasks",
     "if attention_mask.dtype == torch.bool:", "if False:",
     "test_tasks::test_eager_attention_reads_shared_rows"),
    ("places of each row taken for rows of places", "harness.loading",
     "if found.dim() != 3:", "if False:",
     "test_tasks::test_code_that_keeps_logits_its_own_way_is_given_a_number[a list]"),
    ("no window known", "harness.loading",
     '"sliding_window", "attention_chunk_size"', '"attention_chunk_size", "window"',
     "test_tasks::test_a_model_says_whether_texts_may_share_its_rows[gemma3-4096-dtype0]"),
    ("loss in the logits' fp16", "tasks",
     "logits[batch.row, place].float()", "logits[batch.row, place]",
     "test_tasks::test_half_logits_make_an_fp32_loss"),
    ("an option's score summed, not averaged", "tasks",
     "1 / torch.tensor(length).float()", "torch.ones(len(length))",
     "test_tasks::test_the_score_is_a_mean_not_a_sum"),
    ("LM loss over all options, wrong ones too", "tasks",
     "== batch.labels[batch.slot // C]", ">= 0",
     "test_tasks::test_losses_are_mezos"),
    ("No and Yes in the wrong order", "tasks",
     '_NO_YES = ("No", "Yes")', '_NO_YES = ("Yes", "No")',
     "test_tasks::test_prompts_are_mezos_to_the_character"),
    ("validation from the front of the draw", "harness.dataset",
     "train, validation = drawn[:cut], drawn[cut:]",
     "train, validation = drawn[-cut:], drawn[:-cut]",
     "test_tasks::test_split_is_mezos"),
    ("every epoch in the same order", "tasks",
     "np.random.RandomState([seed, epoch])", "np.random.RandomState(seed)",
     "test_tasks::test_epochs_and_seeds_differ"),
    ("NaN answers with the first option", "tasks",
     "torch.where(finite, right, 0.0), finite",
     "(scores.argmax(1) == batch.labels).float(), finite",
     "test_tasks::test_a_score_that_is_not_finite_is_no_right_answer"),
    ("of equally likely options the first wins", "tasks",
     "likeliest.gather(1, batch.labels[:, None])[:, 0] / likeliest.sum(1)",
     "(scores.argmax(1) == batch.labels).float()",
     "test_tasks::test_options_that_are_equally_likely_share_an_answer"),
    ("one view keeps a whole checkpoint in memory", "harness.loading",
     "there(parameter.data, copy=True)", "there(parameter.data)",
     "test_quant::test_a_split_model_lets_its_checkpoint_go[4]"),
    ("codebooks of another model's weights", "harness.mask",
     "if not same or (file.codebooks and", "if not same or (False and",
     "test_mask_command::test_codebooks_are_of_every_weight[dtype0]"),
    ("micro-batches of any size counted alike", "tasks",
     'return len(self.labels if self.scored == "all" else self.token)', "return 1",
     "test_tasks::test_micro_batches_are_the_whole_batch_to_rounding[all-3]"),
    ("right tokens counted as examples", "tasks",
     'return len(self.labels if self.scored == "all" else self.token)',
     "return len(self.labels)",
     "test_tasks::test_micro_batches_are_the_whole_batch_to_rounding[right-3]"),
    ("a loss on the user's tokens, too", "harness.dataset",
     "            start = len(ids) - length\n", "            start = 1\n",
     "test_tasks::test_only_the_assistants_tokens_have_a_loss"),
    ("BOS before the chat template's own", "harness.dataset",
     "after[len(before) :], special=False", "after[len(before) :], special=True",
     "test_tasks::test_only_the_assistants_tokens_have_a_loss"),
    ("the end of a turn is not learnt", "harness.dataset",
     "text(i + 1).rstrip()", "text(i + 1).rstrip().removesuffix(tokenizer.eos_token)",
     "test_tasks::test_only_the_assistants_tokens_have_a_loss"),
    ("a completion that never ends", "harness.dataset",
     '(row["completion"].removesuffix(end) + end,)', '(row["completion"],)',
     "test_tasks::test_completions_of_own_files"),
    ("perplexity of the padding, too", "tasks",
     "total += float(loss.sum()), len(loss), broken",
     "total += float(loss.sum()), batch.input_ids.numel(), broken",
     "test_tasks::test_perplexity_is_over_tokens_one_at_a_time"),
    ("perplexity of a mean of the examples' means", "tasks",
     "total += float(loss.sum()), len(loss), broken",
     "total += float(loss @ batch.weight), len(part), broken",
     "test_tasks::test_perplexity_is_over_tokens_one_at_a_time"),
    ("blocks that share a token", "harness.dataset",
     "ids[i + 1 : i + length]", "ids[i + 1 : i + length + 1]",
     "test_tasks::test_a_text_is_blocks_of_tokens[4]"),
    ("answers 1, 2, 3 taken for indices", "tasks",
     '"labels": ("1", "2", "3")', '"labels": ("0", "1", "2")',
     "test_tasks::test_prompts_are_mezos_to_the_character[siqa]"),
    # ------------------------------------------------------------ the loop and its log
    ("the highest perplexity is the best", "harness.log",
     'best = max if self.metric == "accuracy" else min', "best = max",
     "rehearsals/test_inputs::test_the_lowest_perplexity_chooses"),
    ("the loop goes uphill", "train",
     "np.float32(-config.lr * proj_grad)", "np.float32(config.lr * proj_grad)",
     "test_train::test_the_log_is_minus_lr_times_proj_grad_and_a_fresh_seed"),
    ("the same noise at every step", "train",
     "zo.step_seed(config.seed, t)", "zo.step_seed(config.seed, 0)",
     "test_train::test_the_log_is_minus_lr_times_proj_grad_and_a_fresh_seed"),
    ("a NaN loss applied", "train",
     "if math.isfinite(step.a):\n            # θ_i", "if True:\n            # θ_i",
     "test_train::test_a_loss_that_is_not_finite_never_touches_the_weights"),
    ("an edited line of the log believed", "train",
     "if None in found or repr(", "if None in found or False and repr(",
     "test_train::test_a_line_follows_from_its_losses"),
    ("a log with other line ends begun anew", "harness.log",
     'if b"\\r" in text[len(whole) : -1]:', "if False:",
     "test_train::test_files_that_were_edited_are_one_line"),
    ("replay forgets to refresh the thresholds", "train",
     "        patch.refresh(step.step - 1)\n", "",
     "test_train::test_the_log_rebuilds_the_last_weights_to_the_bit"),
    ("the trained model kept while that of the best step is loaded", "train",
     "        del model, patch\n", "        del model\n",
     "test_train::test_a_model_is_gone_before_the_next_is_loaded"),
    ("each worker follows its own losses", "train",
     "    total = workers.all_sum(total)", "    total = total",
     "rehearsals/test_workers::test_workers_are_the_run_of_one_to_rounding"),
    ("a torn last line of the log believed", "harness.log",
     'whole = text[: text.rfind(b"\\n") + 1]', "whole = text",
     "test_train::test_a_torn_last_line_is_dropped"),
    ("the step log rounded to four digits", "harness.log",
     '"" if x is None else repr(x)', '"" if x is None else f"{x:.4g}"',
     "test_train::test_the_log_rebuilds_the_last_weights_to_the_bit"),
    ("a 16-bit run that goes on with other weights", "harness.config",
     "fixed = {*KEPT, \"out\"}", "fixed = {\"out\"}",
     "test_train::test_a_resumed_run_moves_what_it_moved"),
    ("the last step believed, not taken again", "harness.log",
     "    if not same:\n", "    if False:\n",
     "test_train::test_resume_refuses_what_is_not_the_runs_own"),
    # ------------------------------------------------------------ adapters
    ("LoRA's mask taken from A B, not from θ_0", "harness.adapter",
     "masks.get_mask(theta, self.h), product)",
     "masks.get_mask(product, masks.threshold(product, 0.3)), product)",
     "test_adapter::test_s_mezo_lora_is_theta_0_plus_m_times_the_product"),
    ("LoRA's α/r left out", "harness.adapter",
     'self.layer.get_delta_weight("default")',
     '(self.layer.lora_B["default"].weight @ self.layer.lora_A["default"].weight)',
     "test_adapter::test_s_mezo_lora_is_theta_0_plus_m_times_the_product"),
    ("A B added twice, with the mask and by peft", "harness.adapter",
     'layer.merged_adapters.append("default")', "pass",
     "test_adapter::test_s_mezo_lora_is_theta_0_plus_m_times_the_product"),
    ("the weights move beside the adapter", "harness.adapter",
     r'MOVES = r"\.lora_[AB]\.|^prompt_encoder\."', 'MOVES = ""',
     "test_adapter::test_a_step_is_algorithm_1_on_the_adapters_tensors"),
    ("an adapter drawn anew by whoever goes on", "harness.adapter",
     "torch.manual_seed(config.seed)", "torch.seed()",
     "test_adapter::test_an_adapter_is_of_the_seed_alone"),
    ("a prefix that peft drew", "harness.adapter",
     "initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)", "pass",
     "test_adapter::test_a_prefix_begins_as_five_tokens_in_front"),
    ("positions that peft's wrapping hides", "tasks",
     'model.get_base_model() if hasattr(model, "get_base_model") else model', "model",
     "test_adapter::test_a_prefix_begins_as_five_tokens_in_front"),
    # ------------------------------------------------------------ models that compute nonsense
    ("missing weights drawn at random", "harness.loading",
     'read["missing_keys"]', '[]',
     "rehearsals/test_inputs::test_no_weight_is_drawn_at_random[mezo-no head]"),
    ("FP8 codes taken for weights", "harness.loading",
     'part.quantization_config["dequantize"] = True', "del part.quantization_config",
     "rehearsals/test_inputs::test_fp8_is_unpacked"),
    ("a model that looks ahead", "harness.loading",
     "change(plain, ahead)[:, :-1].max()", "0",
     "rehearsals/test_inputs::test_models_that_cannot_be_trained_like_this[bert]"),
    ("NaN beside padding is no change", "harness.loading",
     "not (moved := float(_change(plain[0], behind).median())) <= rounding",
     "(moved := float(_change(plain[0], behind).median())) > rounding",
     "rehearsals/test_inputs::test_a_model_that_breaks_beside_padding_is_refused"),
    ("a model that minds padding", "harness.loading",
     "change(plain[0], behind).median()", "0",
     "rehearsals/test_inputs::test_models_that_cannot_be_trained_like_this[rwkv]"),
    # ------------------------------------------------------------ [Q]'s masks
    ("squares taken in the gradient's dtype", "masks",
     "g = gradient.to(scores[name].device, torch.float32)\n        scores[name].addcmul_(g, g)",
     "g = gradient.to(scores[name].device)\n        scores[name].add_(g * g)",
     "test_masks::test_squares_are_fp32_where_fp16_would_underflow"),
    ("largest: indices negated, not magnitudes", "masks",
     "name: top(weights[name].abs(), k)",
     "name: (-top(weights[name].abs(), k) % weights[name].numel()).sort().values.int()",
     "test_masks::test_largest_and_smallest_rank_values_not_places", CURVE),
    ("top-k over all matrices, not per matrix", "masks",
     "    return {name: top(s, ks[name]) for name, s in scores.items() if name in ks and s.any()}",
     "    flat = torch.cat([s.flatten() for s in scores.values()])\n"
     "    h = flat.kthvalue(flat.numel() - round(density * flat.numel()) + 1).values\n"
     "    return {n: (s.flatten() >= h).nonzero().flatten().int() for n, s in scores.items()}",
     "test_masks::test_ranking_is_per_matrix"),
    ("ties taken whole: more than k", "masks",
     "equal[: k - len(above)]", "equal",
     "test_masks::test_top_is_exactly_k_also_where_values_tie"),
    ("scored in train mode, with dropout", "masks",
     "        model.eval()\n", "        model.train()\n",
     "test_masks::test_fisher_is_brute_force_autograd"),
    ("gradients of before added to the first sample's", "masks",
     "            p.grad = None\n            hook", "            hook",
     "test_masks::test_the_model_is_as_it_was"),
    # ------------------------------------------------------------ dense + sparse
    ("sensitive weights quantised with the rest", "quant",
     "            dense.view(-1)[places] = 0\n", "",
     "test_quant::test_dense_plus_sparse_is_w_at_the_places"),
    ("the sparse values kept in 16 bits", "quant",
     "weight.reshape(-1)[places].float()", "weight.reshape(-1)[places].half().float()",
     "test_quant::test_dense_plus_sparse_is_w_at_the_places"),
    ("k-means that counts every weight alike", "quant",
     "importance = importance.double().gather(1, order)",
     "importance = torch.ones_like(w)",
     "test_quant::test_the_error_is_close_to_the_least"),
    ("what moves stretches a row", "quant",
     "weight.where(importance > 0, heaviest).double()", "weight.double()",
     "test_quant::test_what_moves_counts_for_nothing"),
    ("cuts at the widest gaps alone", "quant",
     "torch.linspace(0, 1, EVEN,", "torch.linspace(0, 1, 2,",
     "test_quant::test_the_error_is_close_to_the_least"),
    ("cuts at even steps alone", "quant",
     "min(WIDEST, gaps.shape[1])", "0",
     "test_quant::test_sixteen_different_weights_in_a_row_are_exact"),
    ("a row read with the codebook of another", "quant",
     "return self.levels.gather(1,", "return self.levels.roll(1, 0).gather(1,",
     "test_quant::test_sixteen_different_weights_in_a_row_are_exact"),
    ("sensitive weights clustered with the rest", "quant",
     "        importance.view(-1)[places.to(scores.device, torch.int64)] = 0\n", "",
     "test_quant::test_what_moves_counts_for_nothing"),
    ("packed row by row, as bitsandbytes gets wrong with AVX-512", "quant",
     "weight.view(-1, BLOCK), blocksize", "weight, blocksize",
     "test_quant::test_blocks_that_straddle_rows_are_unpacked_rightly"),
    ("the 16-bit matrix as scratch", "quant",
     "return parameter.detach().clone(memory_format=torch.contiguous_format)",
     "return parameter.detach()",
     "test_quant::test_probes_change_nothing_and_updates_the_values_alone"),
    ("every matrix reads the first one's values", "quant",
     "self.sparse.values[self.slice]", "self.sparse.values[: len(self.places)]",
     "test_model_patch::test_a_step_of_q_equals_the_literal_algorithm_1_on_k_values", CURVE),
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
        shutil.copytree(ROOT / "harness", copy / "harness", ignore=shutil.ignore_patterns("__*__"))
        (copy / "harness" / "__init__.py").touch()
        for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
            shutil.copy(path, copy)
        if mutant:
            _, module, old, new, *_ = mutant
            source = copy / f"{module.replace('.', '/')}.py"
            text = source.read_text(encoding="utf-8")
            if text.count(old) != 1:
                return f"DOES NOT APPLY: {old!r} occurs {text.count(old)} times"
            source.write_text(text.replace(old, new), encoding="utf-8")
        code, last = run_tests(copy, tests)
    expected = {0: "SURVIVED", 1: "killed"} if mutant else {0: "passed"}
    return expected.get(code, f"BROKEN, pytest's exit code {code}: {last}")


def main() -> int:
    began, wanted = time.perf_counter(), " ".join(sys.argv[1:])
    if not (mutants := [m for m in MUTANTS if wanted in " ".join(m)]):
        sys.exit(f"no mutant's line contains {wanted!r}")
    os.environ |= {"OMP_NUM_THREADS": "1"}
    context = get_context("forkserver")  # every test run is a fork of one that has imported torch
    context.set_forkserver_preload(IMPORTED_ONCE)
    bad = 0
    with ProcessPoolExecutor(WORKERS, mp_context=context, max_tasks_per_child=1) as pool:
        original = pool.submit(verdict, None, sorted({m[4] for m in mutants}))
        found = [pool.submit(verdict, m, [m[4]]) for m in mutants]
        print(f"{'mutant':<50} {'module':<16} killed by", flush=True)
        for mutant, answer in zip(mutants, found, strict=True):
            survived = answer.result() != "killed"
            bad += survived
            by = f"{answer.result()} ({mutant[4]})" if survived else mutant[4]
            print(f"{mutant[0]:<50} {mutant[1]:<16} {by}", flush=True)
    if original.result() != "passed":
        print(f"these tests should pass on the source as it is: {original.result()}")
    minutes = (time.perf_counter() - began) / 60
    print(f"{len(mutants) - bad} of {len(mutants)} mutants killed in {minutes:.1f} minutes")
    return int(bad > 0 or original.result() != "passed")


if __name__ == "__main__":
    sys.exit(main())
