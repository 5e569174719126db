// The C interface through which tests choose how the emulator runs.
#include "emulator/machine.h"

extern "C" {

// schedule: 0 first in first out, 1 last in first out, 2 random. asynchrony: 0 late, 1 early, 2 mixed.
void emulator_configure(int schedule, int asynchrony, uint64_t seed, int jitter, int check, int strict_acquire,
                        int capability, int multiprocessors, int largest_cluster) {
  emulator::Config& config = emulator::machine.config;
  config.schedule = static_cast<emulator::Config::Schedule>(schedule);
  config.asynchrony = static_cast<emulator::Config::Asynchrony>(asynchrony);
  config.seed = seed;
  config.jitter = jitter;
  config.check = check != 0;
  config.strict_acquire = strict_acquire != 0;
  config.capability = capability;
  config.multiprocessors = multiprocessors;
  config.largest_cluster = largest_cluster;
  emulator::machine.stats.launches = 0;  // a seed gives the same schedules again
}

// launches, blocks, switches, accesses, collectives, barriers since the library was loaded; launches since configure.
void emulator_stats(uint64_t* values) {
  const emulator::Stats& stats = emulator::machine.stats;
  const uint64_t all[] = {stats.launches, stats.blocks,      stats.switches,
                          stats.accesses, stats.collectives, stats.barriers};
  for (uint64_t value : all) *values++ = value;
}

}  // extern "C"
