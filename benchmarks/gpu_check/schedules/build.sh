#!/bin/sh
# nvcc with the project's own flags (--fmad=false), for sm_90 alone.
cd "$(dirname "$0")" && nvcc -O3 -std=c++20 --extended-lambda --expt-relaxed-constexpr --fmad=false -Xcompiler=-ffp-contract=off \
  -gencode=arch=compute_90,code=sm_90 -Itorch/include \
  -cudart static -Xcompiler=-static-libstdc++ -Xcompiler=-static-libgcc --split-compile=2 -Xptxas -v variants.cu -o variants > build.log 2>&1
