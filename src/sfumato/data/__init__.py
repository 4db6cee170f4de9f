"""Data: pictures with what is known of them, in an order that is a pure function of the seed.

Nothing here needs torch.
"""
