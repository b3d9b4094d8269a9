#!/bin/bash
# Every family in a process of its own: a failure ends only that one. All of it within TOTAL seconds (60).
# What was measured is also in $OUT/variants.txt, as the reply of a device run keeps only the last 12,000 characters.
cd "$(dirname "$0")" || exit 1
log=${OUT:-.}/variants.txt
total=${TOTAL:-60}
: > "$log"
SECONDS=0
for job in "resnet50 T" "resnet50 B" "resnet50 A" "resnet50 W" "7b T" "7b A" "vit T" "7b B" "vit W" "vit A" "vit B" "7b W"; do
  left=$((total - SECONDS))
  [ $left -lt 3 ] && { echo "## no time left for: $job" | tee -a "$log"; continue; }
  limit=$((left < 15 ? left : 15))
  replays=17
  [[ $job == 7b* ]] && replays=9
  REPLAYS=$replays timeout -k 1 $limit ./variants $job $((limit - 2)) 2>&1 | tee -a "$log"
  rc=${PIPESTATUS[0]}
  [ $rc -ne 0 ] && echo "!! $job ended with $rc" | tee -a "$log"
  if [ $rc -eq 3 ] && [[ $job != *T ]] && [ $((total - SECONDS)) -gt 8 ]; then  # a CUDA error: perhaps of PDL
    NOPDL=1 REPLAYS=$replays timeout -k 1 8 ./variants $job 6 2>&1 | tee -a "$log"
  fi
done
echo "## all in $SECONDS s" | tee -a "$log"
grep -c '!WRONG\|!TIMEOUT\|!ERR' "$log" | sed 's/^/## lines with faults: /' | tee -a "$log"
