"""Segments and plan of a batch as they were computed at first: position by position of the flattened batch."""

import torch

from echo_trainer.method.forms import Reach
from echo_trainer.method.layouts import full_layout
from echo_trainer.method.plan import EchoPlan
from echo_trainer.method.segments import IGNORE_INDEX
from echo_trainer.method.suffixes import suffix_layout
from echo_trainer.passes.echo import BATCH, RECOMPUTED, SUFFIX


def reference_segments(batch, examples):
    """What `find_segments` finds, and predict_F, labels_F, document_F and segment_F."""
    labels_BT = batch["labels"]
    n_rows, length = labels_BT.shape
    document_F = number_runs(documents(batch, n_rows, length).reshape(-1))
    answer_F = true_labels(batch, examples).reshape(-1).ne(IGNORE_INDEX) & document_F.ge(0)
    next_label_BT = torch.full_like(labels_BT, IGNORE_INDEX)
    next_label_BT[:, :-1] = labels_BT[:, 1:]
    labels_F = next_label_BT.reshape(-1)
    previous_answer_F = torch.zeros_like(answer_F)
    previous_answer_F[1:] = answer_F[:-1] & document_F[:-1].eq(document_F[1:])
    starts_document_F = torch.ones_like(answer_F)
    starts_document_F[1:] = document_F[:-1].ne(document_F[1:])
    start_F = answer_F & ~previous_answer_F
    run_F = start_F.cumsum(0) - 1
    start_position = start_F.nonzero().flatten()
    has_boundary = ~starts_document_F[start_position]
    number = has_boundary.cumsum(0) - 1
    number[~has_boundary] = -1
    segment_F = torch.full_like(run_F, -1)
    segment_F[answer_F] = number[run_F[answer_F]]
    first_position = start_position[has_boundary]
    real = document_F.ge(0)
    ends = torch.ones_like(real)
    ends[:-1] = document_F[:-1].ne(document_F[1:])
    predict_F = labels_F.ne(IGNORE_INDEX)
    found = {
        "predict_F": predict_F, "labels_F": labels_F, "document_F": document_F, "segment_F": segment_F,
        "boundary_S": first_position - 1, "document_S": document_F[first_position],
        "start_D": (starts_document_F & real).nonzero().flatten(), "end_D": (ends & real).nonzero().flatten() + 1,
    }  # fmt: skip
    answered, routable = (torch.zeros(len(found["start_D"]), dtype=torch.bool) for _ in range(2))
    answered[document_F[predict_F & real]] = True
    routable[found["document_S"]] = True
    return found | {"answered_D": answered, "routable_D": routable & answered}


def number_runs(ids_F):
    starts = torch.ones_like(ids_F, dtype=torch.bool)
    starts[1:] = ids_F[1:].ne(ids_F[:-1])
    real = ids_F.ge(0)
    return (starts & real).cumsum(0).sub(1).masked_fill(~real, -1)


def documents(batch, n_rows, length):
    attention_mask, position_ids = batch.get("attention_mask"), batch.get("position_ids")
    if attention_mask is None and position_ids is not None:
        return position_ids.eq(0).reshape(-1).cumsum(0).sub(1).reshape(n_rows, length)
    rows = torch.arange(n_rows)[:, None].expand(n_rows, length)
    return rows if attention_mask is None else rows.masked_fill(attention_mask.eq(0), -1)


def true_labels(batch, examples):
    labels = batch["labels"]
    if not examples or "attention_mask" in batch or "position_ids" not in batch:
        return labels
    if not all("labels" in example for example in examples):
        return batch["input_ids"]
    flat = torch.cat([torch.as_tensor(example["labels"]) for example in examples])
    restored = labels.clone()
    restored[0, : len(flat)] = flat
    return restored


def reference_plan(found, segments, routed, positions, form, position_ids, lockstep):
    """What `make_plan` plans for what `reference_segments` found; `segments` are for the layout."""
    routed_D = torch.tensor(routed) & found["routable_D"]
    predict_N = found["predict_F"].nonzero().flatten()
    document_N = found["document_F"][predict_N]
    routed_S = routed_D[found["document_S"]]
    number_S = routed_S.cumsum(0) - 1
    inject_F = torch.full_like(found["segment_F"], -1)
    answer = found["segment_F"].ge(0).nonzero().flatten()
    segment = found["segment_F"][answer]
    keep = routed_S[segment]
    inject_F[answer[keep]] = number_S[segment[keep]]
    if positions == "predicting":
        inject_F[found["boundary_S"][routed_S]] = number_S[routed_S]
    inject_position = inject_F.ge(0).nonzero().flatten()
    first_D = torch.full((len(routed_D),), len(inject_F))
    first_D.scatter_reduce_(0, found["document_F"][inject_position], inject_position, "amin")
    in_document = document_N.ge(0)  # of no document at first: the last one was taken for it
    routed_N = routed_D[document_N] & in_document
    reached_N = routed_N & predict_N.ge(first_D[document_N])
    reach_E = reached_N.nonzero().flatten()
    boundary_G, layout = found["boundary_S"][routed_S], None
    reach = Reach(segments, inject_F, first_D, predict_N[reach_E], position_ids)
    if (len(reach_E) or lockstep) and form in (SUFFIX, RECOMPUTED):
        layout = suffix_layout(reach, recompute=form is RECOMPUTED)
    elif len(reach_E) or lockstep:
        layout = full_layout(reach, all_rows=form is BATCH)
    if not len(reach_E) and lockstep:
        boundary_G = found["start_D"][:1] if len(found["start_D"]) else torch.zeros(1, dtype=torch.int64)
    return EchoPlan(
        predict_N=predict_N,
        labels_N=found["labels_F"][predict_N],
        plain_weight_N=1.0 + (routed_N & ~reached_N).float(),
        reach_E=reach_E,
        reach_host_E=reach_E.numpy(),
        boundary_G=boundary_G,
        form=form,
        layout=layout,
        probability=0.5,
        n_samples=int(found["answered_D"].sum()),
        n_routed=int(routed_D.sum()),
        n_unroutable=int((found["answered_D"] & ~found["routable_D"]).sum()),
        n_routed_tokens=int(routed_N.sum()),
        n_tokens=int(found["document_F"].ge(0).sum()),
        lockstep=lockstep,
    )
