"""Stub."""


def check_mergeable(p):
    pass


def merged_weights(p, dtype=None):
    from peft import PeftModel
    import copy

    base = p.get_base_model() if isinstance(p, PeftModel) else p
    q = copy.deepcopy(p)
    q = q.merge_and_unload() if isinstance(q, PeftModel) else q
    for n, w in q.named_parameters():
        yield n, w.detach()
    yield "lm_head.weight", q.get_output_embeddings().weight.detach()
