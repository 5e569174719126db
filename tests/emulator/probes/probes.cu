// The C interface of the probes.
#include "emulator/probes/probe.h"

extern "C" {

__attribute__((visibility("default"))) int probe_count() { return static_cast<int>(probe::entries().size()); }
__attribute__((visibility("default"))) const char* probe_name(int i) { return probe::entries()[i].name; }
__attribute__((visibility("default"))) const char* probe_expected(int i) { return probe::entries()[i].expected; }
__attribute__((visibility("default"))) const char* probe_run(int i) { return probe::entries()[i].run(); }

}  // extern "C"
