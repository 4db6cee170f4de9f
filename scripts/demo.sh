#!/bin/sh
# Train the quickstart recipe, judge it, draw some prompts. Called again, it goes on where it was, or only draws anew.
set -eu
sfumato=$1
run=runs/quickstart
if [ -d "$run/checkpoints" ]; then
    "$sfumato" train --resume "$run"
else
    "$sfumato" train quickstart
fi
"$sfumato" eval "$run" --suite scenes
"$sfumato" sample "$run" --prompts scripts/demo-prompts.txt --n 4 --grid --out "$run/demo"
cat <<END

What was made:
  $run/demo             the prompts' pictures, and all of them on the newest grid-*.png
  $run/eval             hits and misses of every task
  $run/loss.png         how training went; $run/samples, how pictures grew
  $run/model            the model: sfumato.load("$run")

Next:
  .venv/bin/sfumato sample $run "a red circle left of a blue square" --n 8
  .venv/bin/sfumato doctor $run
  .venv/bin/sfumato train quickstart data.kind=folder data.path=DIR name=mine
END
