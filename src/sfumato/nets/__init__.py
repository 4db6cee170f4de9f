"""Networks. They know torch and nothing of diffusion: net(x, t, **conditions) -> a tensor like x.

All take the same keyword-only conditions and use those that their config asks for: `label` (B,) with `classes`
standing for "none"; `context` (B, L, context_dim), one vector a token, with `context_mask` (B, L), True where there
is one; `pooled` (B, pooled_dim), one vector for the whole prompt. Every file reads alone, with `layers.py` beside it.
"""
