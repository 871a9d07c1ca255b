// Images from a file of float32 numbers, (B, C, H, W) without a header, and what a model says of them.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

inline std::vector<float> read_images(const std::string& path, size_t image) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  const size_t bytes = file.tellg();
  if (bytes == 0 || bytes % (image * sizeof(float)))
    throw std::runtime_error(path + ": its size is no multiple of an image's, " + std::to_string(image) + " floats");
  std::vector<float> images(bytes / sizeof(float));
  file.seekg(0).read(reinterpret_cast<char*>(images.data()), bytes);
  return images;
}

// Runs a model twice, since the first time is slower, and prints the class and the logit of every image, and the time.
inline void report(size_t images, const std::function<std::vector<float>()>& run) {
  run();
  const auto start = std::chrono::steady_clock::now();
  const std::vector<float> logits = run();
  const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
  const size_t classes = logits.size() / images;
  for (size_t i = 0; i < images; ++i) {
    const auto row = logits.begin() + i * classes, best = std::max_element(row, row + classes);
    std::printf("%td %.6f\n", best - row, *best);
  }
  std::fprintf(stderr, "%.3f ms per image\n", time.count() / images);
}
