# The architectures that a CUDA compiler of this version builds for by default: Turing, Ampere, Ada, Hopper; Volta up to
# CUDA 12, which is the last that knows it; Blackwell from CUDA 12.8 on. The last one also as PTX, for what comes later.
function(gafext_cuda_architectures result compiler_version)
  set(architectures 75-real 80-real 86-real 89-real 90)
  if(compiler_version VERSION_GREATER_EQUAL 12.8)
    set(architectures 75-real 80-real 86-real 89-real 90-real 100-real 120)
  endif()
  if(compiler_version VERSION_LESS 13)
    list(PREPEND architectures 70-real)
  endif()
  set(${result} ${architectures} PARENT_SCOPE)
endfunction()
