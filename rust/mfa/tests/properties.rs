//! Attention and its gradients against the formulas in f64, on problems that proptest draws: sizes, strides, types, options.

#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is a failure

use half::{bf16, f16};
use mfa::{Alignment, Attention, Device, Gradients, MfaContext, QuantizationScheme, QuantizedTensor, TensorView, TensorViewMut};
use proptest::prelude::*;

/// Sizes and options of a problem.
#[derive(Debug, Clone)]
struct Problem {
    batch: usize,
    kv_heads: usize,
    group: usize,
    rows: usize,
    columns: usize,
    channels: usize,
    value_channels: usize,
    causal: Option<bool>,
    window: (Option<u64>, Option<u64>),
    softcap: f64,
    sinks: bool,
    seed: u64,
}

impl Problem {
    fn heads(&self) -> usize {
        self.kv_heads * self.group
    }

    fn query_shape(&self) -> [usize; 4] {
        [self.batch, self.heads(), self.rows, self.channels]
    }

    fn key_shape(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.columns, self.channels]
    }

    fn value_shape(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.columns, self.value_channels]
    }

    fn output_shape(&self) -> [usize; 4] {
        [self.batch, self.heads(), self.rows, self.value_channels]
    }

    fn sinks(&self) -> Vec<f32> {
        (0..self.heads()).map(|head| head as f32 * 0.3 - 0.5).collect()
    }

    fn attention<'a>(&self, sinks: &'a Vec<f32>) -> Attention<'a> {
        let mut attention = Attention::new().softcap(self.softcap).window(self.window.0, self.window.1);
        if let Some(lower_right) = self.causal {
            attention = attention.causal(if lower_right { Alignment::LowerRight } else { Alignment::UpperLeft });
        }
        if self.sinks { attention.sinks(sinks) } else { attention }
    }

    /// Whether row i attends column j.
    fn attends(&self, row: usize, column: usize) -> bool {
        let offset = if self.causal == Some(true) { self.columns as i64 - self.rows as i64 } else { 0 };
        let distance = row as i64 + offset - column as i64;
        !(self.causal.is_some() && distance < 0
            || self.window.0.is_some_and(|left| distance > left as i64)
            || self.window.1.is_some_and(|right| -distance > right as i64))
    }
}

prop_compose! {
    fn problems()(
        (batch, kv_heads, group) in (1usize..3, 1usize..3, 1usize..4),
        (rows, columns) in (1usize..20, 0usize..40),
        (channels, value_channels) in (1usize..40, 1usize..24),
        causal in proptest::option::of(any::<bool>()),
        window in (proptest::option::of(0u64..20), proptest::option::of(0u64..20)),
        softcap in prop_oneof![Just(0.0), Just(2.5)],
        sinks in any::<bool>(),
        seed in any::<u64>(),
    ) -> Problem {
        Problem { batch, kv_heads, group, rows, columns, channels, value_channels, causal, window, softcap, sinks, seed }
    }
}

/// Numbers between -1 and 1.
fn noise(seed: u64, count: usize) -> Vec<f64> {
    let mut state = seed | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
    };
    (0..count).map(step).collect()
}

/// Output and weights by the formulas, of contiguous operands.
fn reference(problem: &Problem, query: &[f64], key: &[f64], value: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let scale = 1.0 / (problem.channels as f64).sqrt();
    let (mut output, mut logsumexp) = (Vec::new(), Vec::new());
    for batch in 0..problem.batch {
        for head in 0..problem.heads() {
            let kv = batch * problem.kv_heads + head / problem.group;
            for row in 0..problem.rows {
                let at = ((batch * problem.heads() + head) * problem.rows + row) * problem.channels;
                let score = |column: usize| {
                    let key = &key[(kv * problem.columns + column) * problem.channels..][..problem.channels];
                    let product: f64 = query[at..][..problem.channels].iter().zip(key).map(|(q, k)| q * k).sum();
                    let product = product * scale;
                    if problem.softcap > 0.0 { problem.softcap * (product / problem.softcap).tanh() } else { product }
                };
                let attended: Vec<usize> = (0..problem.columns).filter(|&column| problem.attends(row, column)).collect();
                let sink = if problem.sinks { f64::from(problem.sinks()[head]).exp() } else { 0.0 };
                let total = attended.iter().map(|&column| score(column).exp()).sum::<f64>() + sink;
                logsumexp.push(total.ln());
                for channel in 0..problem.value_channels {
                    let weighted = |&column: &usize| {
                        score(column).exp() / total * value[(kv * problem.columns + column) * problem.value_channels + channel]
                    };
                    output.push(attended.iter().map(weighted).sum::<f64>());
                }
            }
        }
    }
    (output, logsumexp)
}

fn elements(shape: [usize; 4]) -> usize {
    shape.iter().product()
}

fn operands(problem: &Problem) -> [Vec<f64>; 3] {
    let shapes = [problem.query_shape(), problem.key_shape(), problem.value_shape()];
    [0, 1, 2].map(|index| noise(problem.seed.wrapping_add(index as u64 * 7919), elements(shapes[index])))
}

fn context() -> MfaContext {
    MfaContext::builder().device(Device::Cpu).num_threads(2).build().unwrap()
}

/// A type of elements, rounded to and read again.
trait Rounded: mfa::Element {
    const TOLERANCE: f64;
    fn of(number: f64) -> Self;
    fn real(self) -> f64;
}

macro_rules! rounded {
    ($($type:ty: $tolerance:expr, $of:expr, $real:expr);*) => {$(
        impl Rounded for $type {
            const TOLERANCE: f64 = $tolerance;
            fn of(number: f64) -> Self {
                $of(number)
            }
            fn real(self) -> f64 {
                $real(self)
            }
        }
    )*};
}
rounded!(f32: 1e-5, |number| number as f32, f64::from; f64: 1e-12, |number| number, |number| number;
         f16: 2e-3, f16::from_f64, f16::to_f64; bf16: 1.6e-2, bf16::from_f64, bf16::to_f64);

fn check_forward<T: Rounded>(problem: &Problem) -> Result<(), TestCaseError> {
    let [query, key, value] = operands(problem).map(|numbers| numbers.into_iter().map(T::of).collect::<Vec<T>>());
    let real = |numbers: &[T]| numbers.iter().map(|number| number.real()).collect::<Vec<f64>>();
    let (expected, _) = reference(problem, &real(&query), &real(&key), &real(&value));
    let mut output = vec![T::of(f64::NAN); elements(problem.output_shape())];
    if T::PRECISION == mfa::Precision::Fp64 {
        // Statistics are f64 then, and sinks are among them.
        prop_assume!(!problem.sinks);
    }
    let sinks = problem.sinks();
    let result = problem.attention(&sinks).forward(
        &context(),
        TensorView::new(&query, problem.query_shape()).unwrap(),
        TensorView::new(&key, problem.key_shape()).unwrap(),
        TensorView::new(&value, problem.value_shape()).unwrap(),
        TensorViewMut::new(&mut output, problem.output_shape()).unwrap(),
    );
    prop_assert_eq!(result, Ok(()));
    for (got, expected) in output.iter().zip(&expected) {
        prop_assert!((got.real() - expected).abs() <= T::TOLERANCE, "{} instead of {expected}", got.real());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn forward_follows_the_formulas_in_f32(problem in problems()) {
        check_forward::<f32>(&problem)?;
    }

    #[test]
    fn forward_follows_the_formulas_in_f64(problem in problems()) {
        check_forward::<f64>(&problem)?;
    }

    #[test]
    fn forward_follows_the_formulas_in_f16(problem in problems()) {
        check_forward::<f16>(&problem)?;
    }

    #[test]
    fn forward_follows_the_formulas_in_bf16(problem in problems()) {
        check_forward::<bf16>(&problem)?;
    }

    /// Every gradient against a difference quotient of the reference.
    #[test]
    fn backward_follows_difference_quotients(problem in problems(), direction in any::<u64>()) {
        prop_assume!(problem.columns > 0 && !problem.sinks);
        let operands = operands(&problem);
        let shapes = [problem.query_shape(), problem.key_shape(), problem.value_shape()];
        let views: Vec<TensorView> =
            operands.iter().zip(shapes).map(|(operand, shape)| TensorView::new(operand, shape).unwrap()).collect();
        let grad_output = noise(direction, elements(problem.output_shape()));
        let (mut output, mut logsumexp) = (vec![0.0; grad_output.len()], vec![0.0; problem.batch * problem.heads() * problem.rows]);
        let context = context();
        let sinks = problem.sinks();
        let attention = problem.attention(&sinks);
        let view = TensorViewMut::new(&mut output, problem.output_shape()).unwrap();
        attention.forward_with_logsumexp(&context, views[0], views[1], views[2], view, &mut logsumexp).unwrap();
        let mut gradients = shapes.map(|shape| vec![0.0f64; elements(shape)]);
        let [grad_query, grad_key, grad_value] = &mut gradients;
        let request = Gradients::new(TensorView::new(&grad_output, problem.output_shape()).unwrap())
            .output(TensorView::new(&output, problem.output_shape()).unwrap())
            .query(TensorViewMut::new(grad_query, shapes[0]).unwrap())
            .key(TensorViewMut::new(grad_key, shapes[1]).unwrap())
            .value(TensorViewMut::new(grad_value, shapes[2]).unwrap());
        attention.backward(&context, views[0], views[1], views[2], &logsumexp, request).unwrap();

        let loss = |operands: &[Vec<f64>; 3]| -> f64 {
            let (output, _) = reference(&problem, &operands[0], &operands[1], &operands[2]);
            output.iter().zip(&grad_output).map(|(output, gradient)| output * gradient).sum()
        };
        for which in 0..3 {
            let steps = noise(direction ^ which as u64, operands[which].len());
            let expected: f64 = steps.iter().zip(&gradients[which]).map(|(step, gradient)| step * gradient).sum();
            let moved = |distance: f64| {
                let mut moved = operands.clone();
                moved[which].iter_mut().zip(&steps).for_each(|(number, step)| *number += distance * step);
                loss(&moved)
            };
            let quotient = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            prop_assert!((quotient - expected).abs() <= 1e-6 * (1.0 + expected.abs()), "{quotient} instead of {expected}");
        }
    }

    /// Strides do not change a bit: heads and tokens swapped, gaps between rows, channels reversed.
    #[test]
    fn strides_do_not_matter(problem in problems(), gap in 0usize..4) {
        let operands = operands(&problem).map(|numbers| numbers.into_iter().map(|number| number as f32).collect::<Vec<f32>>());
        let shapes = [problem.query_shape(), problem.key_shape(), problem.value_shape()];
        let sinks = problem.sinks();
        let attention = problem.attention(&sinks);
        let context = context();
        let compute = |views: [TensorView; 3]| {
            let mut output = vec![0.0f32; elements(problem.output_shape())];
            let view = TensorViewMut::new(&mut output, problem.output_shape()).unwrap();
            attention.forward(&context, views[0], views[1], views[2], view).unwrap();
            output
        };
        let plain = compute([0, 1, 2].map(|index| TensorView::new(&operands[index], shapes[index]).unwrap()));
        let placed = [0, 1, 2].map(|index| {
            let [batch, heads, tokens, channels] = shapes[index];
            let row = channels + gap;
            let strides = [tokens * heads * row, row, heads * row, 1].map(|stride| stride as isize);
            let mut memory = vec![f32::NAN; batch * heads * tokens * row];
            for (at, &element) in operands[index].iter().enumerate() {
                let indices = [at / (heads * tokens * channels), at / (tokens * channels) % heads, at / channels % tokens, at % channels];
                memory[indices.iter().zip(strides).map(|(&index, stride)| index * stride as usize).sum::<usize>()] = element;
            }
            (memory, strides)
        });
        let views = [0, 1, 2].map(|index| {
            TensorView::with_strides(&placed[index].0, 0, shapes[index], placed[index].1).unwrap()
        });
        prop_assert_eq!(compute(views), plain);
    }

    /// Whatever shape, strides and offset are asked for, a view either stays within its slice or is refused.
    #[test]
    fn views_stay_within_their_slice(
        length in 0usize..50,
        offset in 0usize..60,
        shape in proptest::array::uniform4(prop_oneof![0usize..5, Just(usize::MAX), Just(u32::MAX as usize)]),
        strides in proptest::array::uniform4(prop_oneof![-9isize..9, Just(isize::MIN), Just(isize::MAX)]),
    ) {
        let memory = vec![0i8; length];
        if TensorView::with_strides(&memory, offset, shape, strides).is_ok() && !shape.contains(&0) {
            let reach = |limit: fn(i128) -> i128| -> i128 {
                shape.iter().zip(strides).map(|(&size, stride)| limit((size as i128 - 1) * stride as i128)).sum()
            };
            prop_assert!(offset as i128 + reach(|distance| distance.min(0)) >= 0);
            prop_assert!(offset as i128 + reach(|distance| distance.max(0)) < length as i128);
        }
        // The same for what has no more elements than memory.
        prop_assert!(TensorView::new(&memory, shape).is_err() || shape.iter().map(|&size| size as u128).product::<u128>() == length as u128);
    }

    /// A quantised tensor is as near to what it was made of as its codes allow.
    #[test]
    fn quantised_values_are_near(
        (heads, tokens, channels) in (1usize..4, 1usize..20, 1usize..40),
        (int4, asymmetric, smooth, rotate) in any::<(bool, bool, bool, bool)>(),
        seed in any::<u64>(),
    ) {
        let shape = [1, heads, tokens, channels];
        let values: Vec<f32> = noise(seed, elements(shape)).into_iter().map(|number| number as f32).collect();
        let scheme = if int4 { QuantizationScheme::int4() } else { QuantizationScheme::int8() };
        let scheme = scheme.symmetric(!asymmetric).smooth(smooth).rotate(rotate);
        let context = context();
        let tensor = QuantizedTensor::new(&context, TensorView::new(&values, shape).unwrap(), scheme).unwrap();
        let back = tensor.dequantize(&context).unwrap();
        // Half a step of each element, which a rotation spreads over a row; smoothing can double a range.
        let steps = if int4 { 7.0 } else { 127.0 };
        let range = 2.0 * if rotate { (channels as f32).sqrt() } else { 1.0 };
        let row_bound = (0.5 * range / steps * 1.01) * (channels as f32).sqrt();
        for (row, original) in back.chunks(channels).zip(values.chunks(channels)) {
            let error: f32 = row.iter().zip(original).map(|(a, b)| (a - b) * (a - b)).sum();
            prop_assert!(error.sqrt() <= row_bound, "{} instead of at most {row_bound}", error.sqrt());
        }
    }
}

#[test]
fn logsumexp_is_that_of_the_scores() {
    let problem = Problem {
        batch: 2,
        kv_heads: 2,
        group: 2,
        rows: 5,
        columns: 9,
        channels: 16,
        value_channels: 8,
        causal: Some(true),
        window: (None, None),
        softcap: 0.0,
        sinks: true,
        seed: 5,
    };
    let operands = operands(&problem).map(|numbers| numbers.into_iter().map(|number| number as f32).collect::<Vec<f32>>());
    let real = |numbers: &[f32]| numbers.iter().map(|&number| f64::from(number)).collect::<Vec<f64>>();
    let (_, expected) = reference(&problem, &real(&operands[0]), &real(&operands[1]), &real(&operands[2]));
    let (mut output, mut logsumexp) = (vec![0.0f32; elements(problem.output_shape())], vec![0.0f32; expected.len()]);
    let sinks = problem.sinks();
    problem
        .attention(&sinks)
        .forward_with_logsumexp(
            &context(),
            TensorView::new(&operands[0], problem.query_shape()).unwrap(),
            TensorView::new(&operands[1], problem.key_shape()).unwrap(),
            TensorView::new(&operands[2], problem.value_shape()).unwrap(),
            TensorViewMut::new(&mut output, problem.output_shape()).unwrap(),
            &mut logsumexp,
        )
        .unwrap();
    for (got, expected) in logsumexp.iter().zip(&expected) {
        assert!((f64::from(*got) - expected).abs() < 1e-5, "{got} instead of {expected}");
    }
}
