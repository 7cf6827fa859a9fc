// A small coverage-guided fuzzer for any compiler: inputs that reach new edges of the target are kept and mutated.
//
//     driver CORPUS SECONDS SEED     SECONDS 0: only drop what adds nothing to the corpus
//
// The target is compiled with -fsanitize-coverage=trace-pc, which calls __sanitizer_cov_trace_pc at every edge; this file
// is not. An edge counts by how often it was passed, in powers of two. The input being run lies in CORPUS/.running, which
// survives whatever the sanitizers do. With clang, -fsanitize=fuzzer takes the place of this file.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Bytes = std::vector<uint8_t>;
namespace fs = std::filesystem;

constexpr size_t kEdges = 1 << 16, kLargest = 1024;
uint8_t passed[kEdges], known[kEdges];
uintptr_t before;
std::mt19937_64 dice;

uint64_t roll(uint64_t sides) { return dice() % sides; }

// Whether the last run passed an edge that no run passed, or more often than any.
bool is_new() {
    bool found = false;
    for (size_t i = 0; i < kEdges; i++) {
        uint8_t bucket = 0;
        for (unsigned times = passed[i]; times; times >>= 1) bucket++;
        if (bucket > known[i]) known[i] = bucket, found = true;
    }
    return found;
}

bool run(const Bytes& input, uint8_t* running) {
    const uint32_t size = (uint32_t)input.size();
    std::memcpy(running, &size, 4);
    std::copy(input.begin(), input.end(), running + 4);
    std::memset(passed, 0, kEdges);
    before = 0;
    LLVMFuzzerTestOneInput(input.data(), input.size());
    return is_new();
}

void change_once(Bytes& bytes, const std::vector<Bytes>& corpus) {
    const uint64_t at = bytes.empty() ? 0 : roll(bytes.size());
    switch (bytes.empty() ? 0 : roll(7)) {  // as many ways as cases
        case 0: bytes.insert(bytes.begin() + at, 1 + roll(64), (uint8_t)roll(256)); break;
        case 1: bytes.erase(bytes.begin() + at, bytes.begin() + at + 1 + roll(bytes.size() - at)); break;
        case 2: bytes[at] ^= (uint8_t)(1 << roll(8)); break;
        case 3: bytes[at] = (uint8_t)roll(256); break;
        case 4: {  // what number formats stumble over, in pairs of bytes
            const uint16_t words[] = {0, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 1, 0x8001, 0x7F7F, 0x7C00, 0xFFFF};
            std::memcpy(&bytes[at & ~1ull], &words[roll(std::size(words))], std::min<size_t>(2, bytes.size() - (at & ~1ull)));
            break;
        }
        case 5: std::fill(bytes.begin() + at, bytes.end(), bytes[at]); break;
        default: {
            const Bytes& other = corpus[roll(corpus.size())];
            for (uint64_t i = at; i < bytes.size() && i < other.size(); i++) bytes[i] = other[i];
        }
    }
    if (bytes.size() > kLargest) bytes.resize(kLargest);
}

// The corpus, run from the smallest input to the largest. What reaches nothing new is dropped, and its file if asked to.
std::vector<Bytes> load(const fs::path& folder, bool drop, uint8_t* running) {
    std::vector<fs::path> paths;
    for (const auto& entry : fs::directory_iterator(folder))
        if (entry.path().filename().string()[0] != '.') paths.push_back(entry.path());
    std::sort(paths.begin(), paths.end(), [](const fs::path& a, const fs::path& b) {
        return std::make_pair(fs::file_size(a), a) < std::make_pair(fs::file_size(b), b);
    });
    std::vector<Bytes> corpus;
    for (const fs::path& path : paths) {
        std::ifstream file(path, std::ios::binary);
        Bytes input{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
        if (input.size() > kLargest) input.resize(kLargest);
        if (run(input, running)) corpus.push_back(input);
        else if (drop) fs::remove(path);
    }
    if (corpus.empty()) corpus.push_back({1, 2, 3, 4, 5, 6, 7, 8});
    return corpus;
}

void keep(const fs::path& folder, const Bytes& input) {
    size_t hash = 1469598103934665603u;
    for (const uint8_t byte : input) hash = (hash ^ byte) * 1099511628211u;
    char name[32];
    std::snprintf(name, sizeof name, "%016zx", hash);
    std::ofstream(folder / name, std::ios::binary).write((const char*)input.data(), (std::streamsize)input.size());
}

uint8_t* running_file(const fs::path& folder) {
    const int descriptor = open((folder / ".running").c_str(), O_RDWR | O_CREAT, 0600);
    if (descriptor < 0 || ftruncate(descriptor, 4 + kLargest)) std::exit(2);
    void* const memory = mmap(nullptr, 4 + kLargest, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    close(descriptor);
    return (uint8_t*)memory;
}

}  // namespace

extern "C" void __sanitizer_cov_trace_pc() {
    const auto here = (uintptr_t)__builtin_return_address(0);
    uint8_t& times = passed[(here ^ before) % kEdges];
    times += times < 255;
    before = here >> 1;
}

int main(int count, char** words) {
    if (count != 4) return std::fprintf(stderr, "driver CORPUS SECONDS SEED\n"), 2;
    const fs::path folder = words[1];
    const double seconds = std::atof(words[2]);
    dice.seed(std::strtoull(words[3], nullptr, 10));
    uint8_t* const running = running_file(folder);
    std::vector<Bytes> corpus = load(folder, seconds == 0, running);
    const auto start = std::chrono::steady_clock::now();
    uint64_t runs = corpus.size(), found = 0;
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
        Bytes input = corpus[roll(corpus.size())];
        for (uint64_t changes = 1 + roll(6); changes; changes--) change_once(input, corpus);
        runs++;
        if (!run(input, running)) continue;
        found++;
        corpus.push_back(input);
        keep(folder, input);
    }
    size_t edges = 0;
    for (const uint8_t bucket : known) edges += bucket > 0;
    fs::remove(folder / ".running");
    std::printf("{\"runs\": %llu, \"edges\": %zu, \"corpus\": %zu, \"new\": %llu}\n", (unsigned long long)runs, edges,
                corpus.size(), (unsigned long long)found);
}
