"""What `benchmarks/fewstep.py` is made of: teaching, judging, verdicts, speed, and what is told of them."""
