//! What the safe layer costs beside the C functions: cargo bench --bench overhead
//!
//! Both run the same problem in short turns, one after the other, and the median of the differences counts: what else the machine does
//! falls on both alike.

#![allow(clippy::expect_used)] // a program, not a library

use std::time::Instant;

use mfa::sys;
use mfa::{Alignment, Attention, MfaContext, TensorView, TensorViewMut};

/// No query, so that no kernel runs: its time, which varies, would only hide what is measured.
const SHAPE: [usize; 4] = [1, 1, 0, 8];

fn main() {
    let context = MfaContext::builder().num_threads(1).build().expect("a context");
    let operand = [0.5f32; 0];
    let (mut direct, mut safe) = ([0.0f32; 0], [0.0f32; 0]);

    let tensor = |data: *mut f32| sys::mfa_tensor_t {
        struct_size: size_of::<sys::mfa_tensor_t>() as u32,
        precision: sys::MFA_PRECISION_FP32,
        data: data.cast(),
        shape: SHAPE.map(|size| size as i64),
        strides: [0, 0, 8, 1],
        ..Default::default()
    };
    let (input, output) = (tensor(operand.as_ptr().cast_mut()), tensor(direct.as_mut_ptr()));
    let mut problem = sys::mfa_attention_t::default();
    // SAFETY: the structure has the size that is given.
    unsafe { sys::mfa_attention_initialize(&mut problem, size_of::<sys::mfa_attention_t>() as u32) };
    problem.softmax_scale = 1.0 / 8.0f64.sqrt();
    (problem.query, problem.key, problem.value, problem.output) = (&input, &input, &input, &output);
    problem.causal = 1;
    let handle = context.as_ptr().cast();
    let mut by_c = || {
        // SAFETY: the structures describe arrays that are alive.
        let status = unsafe { sys::mfa_attention_run_forward(handle, &problem) };
        assert_eq!(status, sys::MFA_SUCCESS);
    };

    // As a program would: with options made once and views made for each call.
    let attention = Attention::new().causal(Alignment::UpperLeft);
    let mut by_rust = || {
        let view = TensorView::new(&operand, SHAPE).expect("a view");
        let output = TensorViewMut::new(&mut safe, SHAPE).expect("a view");
        attention.forward(&context, view, view, view, output).expect("attention");
    };

    let mut turns: Vec<(f64, f64)> = (0..2000).map(|_| (nanoseconds(&mut by_c), nanoseconds(&mut by_rust))).collect();
    turns.sort_by(|one, other| (one.1 - one.0).total_cmp(&(other.1 - other.0)));
    let (c, rust) = turns[turns.len() / 2];
    println!("C function {c:.0} ns, safe layer {rust:.0} ns a call: {:.0} ns more", rust - c);
}

/// The time of one call, over a turn of 100: short enough to fall between the interruptions by others.
fn nanoseconds(call: &mut impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..100 {
        call();
    }
    start.elapsed().as_nanos() as f64 / 100.0
}
