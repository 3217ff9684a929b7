// 3x3 convolution with 8-bit weights: conv3x3_words.h. With AMX, amx/conv3x3_int8.h convolves directly.
#include "../ops/conv3x3_int8.h"

#include "amx/conv3x3_int8.h"
#include "conv3x3_words.h"

namespace gafext::GAFEXT_ISA {

void conv3x3_int8(const Conv3x3Int8Args& args) {
  if (args.batch * args.height * args.width * args.out_channels == 0) return;
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
#if defined(__AMX_INT8__)
    if (args.taps_first) {
      return for_some_pictures<T>(args, ceil_div(args.in_channels, kByteChannels), [](const auto& part) {
        Conv3x3InInt8<T> problem(part);
        TileProduct(problem).run();
      });
    }
#endif
    WordConvolution<Conv3x3Int8Args, T, int8_t>(args, args.weight, args.scale).run();
  });
}

}  // namespace gafext::GAFEXT_ISA
