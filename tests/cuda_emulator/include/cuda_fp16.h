#pragma once
#include "emulated_halves.h"
