// Python bindings: integers in, Params out, the GIL released around every launch. The only file
// that knows Python. Pointers come from zsvr_kernels/ops/*/cpu.py, which has checked the tensors
// behind them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "chain_links/chain_links.h"
#include "correspondence_search/correspondence_search.h"
#include "cross_frame_attention/cross_frame_attention.h"
#include "probes/probes.h"
#include "trajectory_attention/trajectory_attention.h"
#include "zsvr/isa.h"

namespace py = pybind11;

namespace {

using Strides = std::array<int64_t, 4>;

void raise_unless_ok(const zsvr::Status& status) {
  if (status.ok()) return;
  if (status.code == zsvr::StatusCode::kInvalidArgument) throw py::value_error(status.message);
  throw std::runtime_error(status.message);
}

// Runs launch(params, executor) without the GIL; parallel_for is the address of torch_parallel_for,
// or 0.
template <class Params, class Launch>
void run(const Params& params, uintptr_t parallel_for, int threads, Launch launch) {
  if (threads < 1) throw py::value_error("threads must be at least 1");
  zsvr::Executor executor;
  executor.parallel_for = reinterpret_cast<zsvr::ParallelFor>(parallel_for);
  executor.threads = executor.parallel_for == nullptr ? 1 : threads;
  zsvr::Status status;
  {
    py::gil_scoped_release release;
    status = launch(params, executor);
  }
  raise_unless_ok(status);
}

// A pointer member as an integer attribute.
template <class Class, class Params, class Pointee>
void bind_pointer(Class& bound, const char* name, Pointee* Params::* member) {
  bound.def_property(
      name, [member](const Params& p) { return reinterpret_cast<uintptr_t>(p.*member); },
      [member](Params& p, uintptr_t address) { p.*member = reinterpret_cast<Pointee*>(address); });
}

// A token view as a write-only attribute: (address, (stride_b, stride_t, stride_p, stride_h)).
template <class Class, class Params, class View>
void bind_tokens(Class& bound, const char* name, View Params::* member) {
  bound.def_property(name, nullptr, [member](Params& p, std::pair<uintptr_t, Strides> view) {
    using Data = decltype(View::data);
    const Strides& s = view.second;
    p.*member = View{reinterpret_cast<Data>(view.first), s[0], s[1], s[2], s[3]};
  });
}

template <class Params>
void bind_dtype(py::class_<Params>& bound) {
  bound.def_property(
      "dtype", [](const Params& p) { return static_cast<int>(p.dtype); },
      [](Params& p, int dtype) {
        if (dtype < 0 || dtype > 2) throw py::value_error("dtype must be 0, 1 or 2");
        p.dtype = static_cast<zsvr::DType>(dtype);
      });
}

void bind_cross_frame_attention(py::module_& m) {
  using zsvr::CrossFrameAttentionBackwardParams;
  using zsvr::CrossFrameAttentionParams;
  const auto sizes = []<class Params>(py::class_<Params>& c) {
    c.def(py::init<>())
        .def_readwrite("B", &Params::B)
        .def_readwrite("T", &Params::T)
        .def_readwrite("Tk", &Params::Tk)
        .def_readwrite("P", &Params::P)
        .def_readwrite("H", &Params::H)
        .def_readwrite("D", &Params::D)
        .def_readwrite("R", &Params::R)
        .def_readwrite("scale", &Params::scale);
    bind_dtype(c);
    bind_tokens(c, "q", &Params::q);
    bind_tokens(c, "k", &Params::k);
    bind_tokens(c, "v", &Params::v);
    bind_tokens(c, "o", &Params::o);
    bind_pointer(c, "frames", &Params::frames);
    bind_pointer(c, "lse", &Params::lse);
    bind_pointer(c, "workspace", &Params::workspace);
  };
  py::class_<CrossFrameAttentionParams> forward(m, "CrossFrameAttentionParams", py::module_local());
  sizes(forward);
  py::class_<CrossFrameAttentionBackwardParams> backward(m, "CrossFrameAttentionBackwardParams",
                                                         py::module_local());
  sizes(backward);
  bind_tokens(backward, "d_o", &CrossFrameAttentionBackwardParams::d_o);
  bind_pointer(backward, "dlse", &CrossFrameAttentionBackwardParams::dlse);
  bind_tokens(backward, "dq", &CrossFrameAttentionBackwardParams::dq);
  bind_tokens(backward, "dk", &CrossFrameAttentionBackwardParams::dk);
  bind_tokens(backward, "dv", &CrossFrameAttentionBackwardParams::dv);
  backward.def_readwrite("adds", &CrossFrameAttentionBackwardParams::adds);

  m.def("cross_frame_attention_fwd_workspace", &zsvr::cross_frame_attention_fwd_workspace);
  m.def("cross_frame_attention_bwd_workspace", &zsvr::cross_frame_attention_bwd_workspace);
  m.def("cross_frame_attention_fwd",
        [](const CrossFrameAttentionParams& p, uintptr_t parallel_for, int threads) {
          run(p, parallel_for, threads,
              [](const auto& a, const auto& e) { return zsvr::cross_frame_attention_fwd(a, e); });
        });
  m.def("cross_frame_attention_bwd",
        [](const CrossFrameAttentionBackwardParams& p, uintptr_t parallel_for, int threads) {
          run(p, parallel_for, threads,
              [](const auto& a, const auto& e) { return zsvr::cross_frame_attention_bwd(a, e); });
        });
}

void bind_trajectory_attention(py::module_& m) {
  using zsvr::TrajectoryAttentionBackwardParams;
  using zsvr::TrajectoryAttentionParams;
  using zsvr::TrajectoryInverseParams;
  const auto trajectory = []<class Params>(py::class_<Params>& c) {
    c.def(py::init<>())
        .def_readwrite("Bp", &Params::Bp)
        .def_readwrite("T", &Params::T)
        .def_readwrite("Tk", &Params::Tk)
        .def_readwrite("Hg", &Params::Hg)
        .def_readwrite("Wg", &Params::Wg)
        .def_readwrite("L", &Params::L);
    bind_pointer(c, "positions", &Params::positions);
    bind_pointer(c, "valid", &Params::valid);
    bind_pointer(c, "frames", &Params::frames);
  };
  const auto attention = []<class Params>(py::class_<Params>& c) {
    c.def_readwrite("B", &Params::B)
        .def_readwrite("H", &Params::H)
        .def_readwrite("D", &Params::D)
        .def_readwrite("scale", &Params::scale);
    bind_dtype(c);
    bind_tokens(c, "q", &Params::q);
    bind_tokens(c, "k", &Params::k);
    bind_tokens(c, "v", &Params::v);
    bind_pointer(c, "lse", &Params::lse);
    bind_pointer(c, "workspace", &Params::workspace);
  };
  py::class_<TrajectoryAttentionParams> forward(m, "TrajectoryAttentionParams", py::module_local());
  trajectory(forward);
  attention(forward);
  bind_tokens(forward, "o", &TrajectoryAttentionParams::o);
  py::class_<TrajectoryAttentionBackwardParams> backward(m, "TrajectoryAttentionBackwardParams",
                                                         py::module_local());
  trajectory(backward);
  attention(backward);
  bind_tokens(backward, "d_o", &TrajectoryAttentionBackwardParams::d_o);
  bind_pointer(backward, "dlse", &TrajectoryAttentionBackwardParams::dlse);
  bind_pointer(backward, "offsets", &TrajectoryAttentionBackwardParams::offsets);
  bind_pointer(backward, "samples", &TrajectoryAttentionBackwardParams::samples);
  bind_pointer(backward, "weights", &TrajectoryAttentionBackwardParams::weights);
  bind_tokens(backward, "dq", &TrajectoryAttentionBackwardParams::dq);
  bind_tokens(backward, "dk", &TrajectoryAttentionBackwardParams::dk);
  bind_tokens(backward, "dv", &TrajectoryAttentionBackwardParams::dv);
  bind_pointer(backward, "dpositions", &TrajectoryAttentionBackwardParams::dpositions);
  py::class_<TrajectoryInverseParams> inverse(m, "TrajectoryInverseParams", py::module_local());
  trajectory(inverse);
  bind_pointer(inverse, "offsets", &TrajectoryInverseParams::offsets);
  bind_pointer(inverse, "samples", &TrajectoryInverseParams::samples);
  bind_pointer(inverse, "weights", &TrajectoryInverseParams::weights);

  m.def("trajectory_attention_fwd_workspace", &zsvr::trajectory_attention_fwd_workspace);
  m.def("trajectory_attention_bwd_workspace", &zsvr::trajectory_attention_bwd_workspace);
  m.def("trajectory_attention_fwd",
        [](const TrajectoryAttentionParams& p, uintptr_t parallel_for, int threads) {
          run(p, parallel_for, threads,
              [](const auto& a, const auto& e) { return zsvr::trajectory_attention_fwd(a, e); });
        });
  m.def("trajectory_inverse_count",
        [](const TrajectoryInverseParams& p, uintptr_t parallel_for, int threads) {
          run(p, parallel_for, threads,
              [](const auto& a, const auto& e) { return zsvr::trajectory_inverse_count(a, e); });
        });
  m.def("trajectory_inverse_fill",
        [](const TrajectoryInverseParams& p, uintptr_t parallel_for, int threads) {
          run(p, parallel_for, threads,
              [](const auto& a, const auto& e) { return zsvr::trajectory_inverse_fill(a, e); });
        });
  m.def("trajectory_attention_bwd",
        [](const TrajectoryAttentionBackwardParams& p, uintptr_t parallel_for, int threads) {
          run(p, parallel_for, threads,
              [](const auto& a, const auto& e) { return zsvr::trajectory_attention_bwd(a, e); });
        });
}

void bind_chain_links(py::module_& m) {
  using zsvr::ChainLinksParams;
  py::class_<ChainLinksParams> params(m, "ChainLinksParams", py::module_local());
  params.def(py::init<>())
      .def_readwrite("B", &ChainLinksParams::B)
      .def_readwrite("T", &ChainLinksParams::T)
      .def_readwrite("Hg", &ChainLinksParams::Hg)
      .def_readwrite("Wg", &ChainLinksParams::Wg)
      .def_readwrite("window", &ChainLinksParams::window)
      .def_readwrite("round_to_nearest", &ChainLinksParams::round_to_nearest)
      .def_readwrite("check_corners", &ChainLinksParams::check_corners);
  bind_pointer(params, "forward", &ChainLinksParams::forward);
  bind_pointer(params, "backward", &ChainLinksParams::backward);
  bind_pointer(params, "valid_forward", &ChainLinksParams::valid_forward);
  bind_pointer(params, "valid_backward", &ChainLinksParams::valid_backward);
  bind_pointer(params, "positions", &ChainLinksParams::positions);
  bind_pointer(params, "valid", &ChainLinksParams::valid);
  m.def("chain_links", [](const ChainLinksParams& p, uintptr_t parallel_for, int threads) {
    run(p, parallel_for, threads,
        [](const auto& a, const auto& e) { return zsvr::chain_links(a, e); });
  });
}

// Features as a write-only attribute: (address, (stride_n, stride_p)).
template <class Class, class Params>
void bind_features(Class& bound, const char* name, zsvr::ConstFeatures Params::* member) {
  using View = std::pair<uintptr_t, std::array<int64_t, 2>>;
  bound.def_property(name, nullptr, [member](Params& p, const View& view) {
    p.*member = zsvr::ConstFeatures{reinterpret_cast<const void*>(view.first), view.second[0],
                                    view.second[1]};
  });
}

void bind_correspondence_search(py::module_& m) {
  using zsvr::CorrespondenceSearchParams;
  using zsvr::LinkScoreParams;
  const auto common = []<class Params>(py::class_<Params>& c) {
    c.def(py::init<>())
        .def_readwrite("N", &Params::N)
        .def_readwrite("Hg", &Params::Hg)
        .def_readwrite("Wg", &Params::Wg)
        .def_readwrite("C", &Params::C);
    bind_dtype(c);
    bind_features(c, "f_src", &Params::f_src);
    bind_features(c, "f_dst", &Params::f_dst);
    bind_pointer(c, "score", &Params::score);
  };
  py::class_<CorrespondenceSearchParams> search(m, "CorrespondenceSearchParams",
                                                py::module_local());
  common(search);
  search.def_readwrite("radius", &CorrespondenceSearchParams::radius);
  bind_pointer(search, "centre", &CorrespondenceSearchParams::centre);
  bind_pointer(search, "site", &CorrespondenceSearchParams::site);
  bind_pointer(search, "workspace", &CorrespondenceSearchParams::workspace);
  py::class_<LinkScoreParams> score(m, "LinkScoreParams", py::module_local());
  common(score);
  bind_pointer(score, "positions", &LinkScoreParams::positions);

  m.def("correspondence_search_workspace", &zsvr::correspondence_search_workspace);
  m.def("correspondence_search",
        [](const CorrespondenceSearchParams& p, uintptr_t parallel_for, int threads) {
          run(p, parallel_for, threads,
              [](const auto& a, const auto& e) { return zsvr::correspondence_search(a, e); });
        });
  m.def("link_score", [](const LinkScoreParams& p, uintptr_t parallel_for, int threads) {
    run(p, parallel_for, threads,
        [](const auto& a, const auto& e) { return zsvr::link_score(a, e); });
  });
}

// probe(kind, iterations, data, floats, sink, parallel_for, threads) -> FLOP or bytes done.
void bind_probes(py::module_& m) {
  m.def("probe", [](int kind, int64_t iterations, uintptr_t data, int64_t floats, uintptr_t sink,
                    uintptr_t parallel_for, int threads) {
    zsvr::ProbeParams p;
    p.probe = static_cast<zsvr::Probe>(kind);
    p.iterations = iterations;
    p.data = reinterpret_cast<const float*>(data);
    p.floats = floats;
    p.sink = reinterpret_cast<float*>(sink);
    int64_t work = 0;
    run(p, parallel_for, threads,
        [&work](const auto& a, const auto& e) { return zsvr::probe(a, e, &work); });
    return work;
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of zsvr_kernels; private, use the package's functions.";
  m.def("isa", [] { return zsvr::isa_name(zsvr::active_isa()); });
  m.def("compiled_isas", &zsvr::compiled_isas);
  m.def("set_isa", [](const std::string& name) { return zsvr::set_isa(name.c_str()); });
  m.attr("compiler") = __VERSION__;
  bind_cross_frame_attention(m);
  bind_trajectory_attention(m);
  bind_chain_links(m);
  bind_correspondence_search(m);
  bind_probes(m);
}
