//! Bad input is an error with words, never a panic or a write; what is dropped is freed.

#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is a failure

use mfa::{
    Alignment, Attention, Codes, Device, Element, Error, Gradients, Granularity, Int4Pair, MfaBuffer, MfaContext, Operation, Partial,
    Precision, Quantization, QuantizationConfig, QuantizationScheme, QuantizedTensor, TensorView, TensorViewMut,
};

const SHAPE: [usize; 4] = [1, 2, 4, 8];
const ELEMENTS: usize = 64;

/// Computes attention with options on operands that are right, and gives back the error; nothing may have been written.
fn refused(attention: &Attention) -> Error {
    let (operand, mut output) = ([0.5f32; ELEMENTS], [7.0f32; ELEMENTS]);
    let view = TensorView::new(&operand, SHAPE).unwrap();
    let result = attention.forward(&MfaContext::new().unwrap(), view, view, view, TensorViewMut::new(&mut output, SHAPE).unwrap());
    assert_eq!(output, [7.0; ELEMENTS]);
    result.unwrap_err()
}

#[test]
fn bad_options_are_refused() {
    assert!(matches!(refused(&Attention::new().softmax_scale(f64::NAN)), Error::InvalidArgument(_)));
    assert!(matches!(refused(&Attention::new().softcap(-1.0)), Error::InvalidArgument(_)));
    assert!(matches!(refused(&Attention::new().dropout(1.5, 0, 0)), Error::InvalidArgument(_)));
    assert!(matches!(refused(&Attention::new().kv_lengths(&[5])), Error::InvalidDimensions(_)));
    assert!(matches!(refused(&Attention::new().query_offsets(&[1, 2])), Error::InvalidDimensions(_) | Error::InvalidArgument(_)));
    assert!(matches!(refused(&Attention::new().causal(Alignment::LowerRight).query_offsets(&[1])), Error::InvalidArgument(_)));
}

#[test]
fn lengths_that_the_library_trusts_are_checked() {
    let error = refused(&Attention::new().kv_lengths(&[]));
    assert_eq!(error.to_string(), "mfa::Attention::forward: kv_lengths: expected 1 numbers, one a sequence, got 0");
    let error = refused(&Attention::new().sinks(&[0.0f32]));
    assert_eq!(error, Error::InvalidDimensions("mfa::Attention::forward: sinks: expected 2 numbers, got 1".into()));
    let error = refused(&Attention::new().alibi_slopes(&[0.0f64; 2]));
    assert_eq!(error, Error::InvalidArgument("mfa::Attention::forward: alibi_slopes: expected numbers of f32, got f64".into()));

    let context = MfaContext::new().unwrap();
    let (operand, mut output) = ([0.5f32; ELEMENTS], [7.0f32; ELEMENTS]);
    let view = TensorView::new(&operand, SHAPE).unwrap();
    let result = Attention::new().forward_with_logsumexp(
        &context,
        view,
        view,
        view,
        TensorViewMut::new(&mut output, SHAPE).unwrap(),
        &mut [0.0f32; 7],
    );
    assert!(matches!(result, Err(Error::InvalidDimensions(_))));
    assert_eq!(output, [7.0; ELEMENTS]);
    let result = Attention::new().backward(&context, view, view, view, &[0.0f32; 8], Gradients::new(view).grad_logsumexp(&[0.0f32; 9]));
    assert!(matches!(result, Err(Error::InvalidDimensions(_))));
    let result = Attention::new().backward(&context, view, view, view, &[0.0f64; 8], Gradients::new(view));
    assert!(matches!(result, Err(Error::InvalidArgument(_))));
    let part = Partial { output: view, logsumexp: (&[0.0f32; 7]).into() };
    let result = mfa::merge(&context, part, part, TensorViewMut::new(&mut output, SHAPE).unwrap(), &mut [0.0f32; 8]);
    assert!(matches!(result, Err(Error::InvalidDimensions(_))));
}

#[test]
fn bad_views_are_refused() {
    assert!(TensorView::new(&[0.0f32; 5], [1, 1, 2, 3]).is_err());
    assert!(TensorView::new::<f32>(&[], [usize::MAX, usize::MAX, 2, 2]).is_err());
    assert!(TensorView::with_strides(&[0.0f32; 6], 1, [1, 1, 2, 3], [6, 6, 3, 1]).is_err());
    assert!(TensorView::with_strides(&[0.0f32; 6], 2, [1, 1, 2, 3], [0, 0, 3, -1]).is_ok());
    assert!(TensorView::with_strides(&[0.0f32; 6], 1, [1, 1, 2, 3], [0, 0, 3, -1]).is_err());
    let pairs = [Int4Pair::new(0, 0); 4];
    assert!(TensorView::with_strides(&pairs, 0, [1, 1, 2, 3], [8, 8, 4, 1]).is_ok());
    assert!(TensorView::with_strides(&pairs, 0, [1, 1, 2, 3], [8, 8, 3, 1]).is_err());
    assert!(TensorView::with_strides(&pairs, 0, [1, 1, 3, 3], [8, 8, 4, 1]).is_err());
}

#[test]
fn bad_quantisation_is_refused() {
    let codes = [1i8; 6];
    let view = TensorView::new(&codes, [1, 1, 2, 3]).unwrap();
    assert!(view.quantized(Quantization::new(Granularity::Token, &[1.0])).is_err());
    assert!(view.quantized(Quantization::new(Granularity::Token, &[1.0; 2]).zero_points(&[0])).is_err());
    assert!(view.quantized(Quantization::new(Granularity::Token, &[1.0; 2]).channel_means(&[0.0; 2])).is_err());
    assert!(TensorView::new(&[1.0f32], [1; 4]).unwrap().quantized(Quantization::new(Granularity::Tensor, &[1.0])).is_err());
    assert!(
        QuantizedTensor::from_parts(Codes::Int4(vec![Int4Pair(0); 3]), [1, 1, 2, 3], Quantization::new(Granularity::Tensor, &[1.0]))
            .is_err()
    );

    // The library's own check: scales are positive.
    let tensor =
        QuantizedTensor::from_parts(Codes::Int8(vec![1; 6]), [1, 1, 2, 3], Quantization::new(Granularity::Tensor, &[-1.0])).unwrap();
    assert!(matches!(tensor.dequantize(&MfaContext::new().unwrap()), Err(Error::InvalidArgument(_))));

    let context = MfaContext::new().unwrap();
    let input = TensorView::new(&[1.0f32; 6], [1, 1, 2, 3]).unwrap();
    let mut codes = [0i8; 6];
    let mut quantize = |scheme, scales: &mut [f32], points: Option<&mut [i32]>| {
        let output = TensorViewMut::new(&mut codes, [1, 1, 2, 3]).unwrap();
        mfa::quantize_into(&context, input, scheme, output, scales, points, None)
    };
    assert!(quantize(QuantizationScheme::int8(), &mut [0.0; 2], None).is_ok());
    assert!(quantize(QuantizationScheme::int8(), &mut [0.0; 1], None).is_err());
    assert!(quantize(QuantizationScheme::int8(), &mut [0.0; 2], Some(&mut [0; 2])).is_err());
    assert!(quantize(QuantizationScheme::int8().symmetric(false), &mut [0.0; 2], Some(&mut [0; 1])).is_err());
    assert!(quantize(QuantizationScheme::int8().smooth(true), &mut [0.0; 2], None).is_err());
    assert!(quantize(QuantizationScheme::int4(), &mut [0.0; 2], Some(&mut [0; 2])).is_err());
}

#[test]
fn an_output_over_itself_is_refused() {
    let (operand, mut output) = ([0.5f32; ELEMENTS], [7.0f32; ELEMENTS]);
    let view = TensorView::new(&operand, SHAPE).unwrap();
    let output = TensorViewMut::with_strides(&mut output, 0, SHAPE, [0, 0, 8, 1]).unwrap();
    let error = Attention::new().forward(&MfaContext::new().unwrap(), view, view, view, output).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
}

#[test]
fn contexts_and_buffers_that_cannot_be_are_refused() {
    assert!(matches!(MfaContext::builder().num_threads(1000).build(), Err(Error::InvalidArgument(_))));
    if !Device::Metal.is_available() {
        assert!(matches!(MfaContext::builder().device(Device::Metal).build(), Err(Error::DeviceUnavailable(_))));
    }
    let context = MfaContext::new().unwrap();
    assert!(MfaBuffer::<f64>::new(&context, usize::MAX).is_err());
    assert!(matches!(MfaBuffer::<f64>::new(&context, usize::MAX >> 8), Err(Error::AllocationFailed(_) | Error::InvalidDimensions(_))));
    assert!(mfa::create_buffers(&context, usize::MAX, 2).is_err());
    let empty = MfaBuffer::<f32>::new(&context, 0).unwrap();
    assert!(empty.is_empty());
}

#[test]
fn buffers_outlive_their_context_and_serve_another() {
    let context = MfaContext::new().unwrap();
    let mut query = MfaBuffer::<f32>::new(&context, ELEMENTS).unwrap();
    let mut output = MfaBuffer::<f32>::new(&context, ELEMENTS).unwrap();
    query.fill(0.5);
    drop(context);
    let other = MfaContext::new().unwrap();
    let view = query.view(SHAPE).unwrap();
    Attention::new().forward(&other, view, view, view, output.view_mut(SHAPE).unwrap()).unwrap();
    assert!(output.iter().all(|&element| element == 0.5));
}

#[test]
fn strided_views_of_buffers_count_in_elements() {
    let context = MfaContext::new().unwrap();
    let mut memory: Vec<f32> = (0..24).map(|index| index as f32).collect();
    let cache = MfaBuffer::from_slice(&context, &mut memory).unwrap();
    let mut output = MfaBuffer::<f32>::new(&context, 8).unwrap();
    // One token alone, from the ninth element on: its output is its value.
    let token = cache.view_with_strides(8, [1, 1, 1, 4], [24, 24, 4, 1]).unwrap();
    Attention::new().forward(&context, token, token, token, output.view_mut_with_strides(4, [1, 1, 1, 4], [8, 8, 4, 1]).unwrap()).unwrap();
    assert_eq!(output[..], [0.0, 0.0, 0.0, 0.0, 8.0, 9.0, 10.0, 11.0]);
    assert!(cache.view_with_strides(21, [1, 1, 1, 4], [24, 24, 4, 1]).is_err());
}

#[test]
fn a_context_moves_between_threads() {
    let context = MfaContext::new().unwrap();
    let context = std::thread::spawn(move || {
        refused(&Attention::new().softcap(-1.0));
        context.info().unwrap();
        context
    });
    assert!(context.join().unwrap().info().is_ok());
    fn is_send<T: Send>() {}
    fn is_sync<T: Sync>() {}
    is_send::<MfaContext>();
    is_send::<MfaBuffer<f32>>();
    is_sync::<MfaBuffer<f32>>();
    is_send::<TensorViewMut>();
    is_sync::<TensorView>();
    is_sync::<Attention>();
}

#[test]
fn codes_are_those_of_the_header() {
    assert_eq!(Int4Pair::new(-3, 5), Int4Pair(0x5d));
    for even in -8..8 {
        for odd in -8..8 {
            let pair = Int4Pair::new(even, odd);
            assert_eq!((pair.even(), pair.odd()), (even, odd));
        }
    }
    assert_eq!(<half::bf16 as Element>::PRECISION, Precision::Bf16);
    assert_eq!(size_of::<Int4Pair>(), 1);
    assert_eq!(mfa::sys::mfa_tensor_t::default().struct_size, 0);
    // SAFETY: a question without arguments.
    let number = unsafe { mfa::sys::mfa_version() };
    assert_eq!(mfa::version(), format!("{}.{}.{}", number / 10000, number / 100 % 100, number % 100));
}

#[test]
fn quantising_on_the_way_in_is_near_and_named() {
    let context = MfaContext::new().unwrap();
    let values: Vec<f32> = (0..ELEMENTS).map(|index| (index as f32 * 0.37).sin()).collect();
    let view = TensorView::new(&values, SHAPE).unwrap();
    let compute = |config: Option<QuantizationConfig>| {
        let mut output = vec![0.0f32; ELEMENTS];
        let attention = config.map_or(Attention::new(), |config| Attention::new().quantize(config));
        attention.forward(&context, view, view, view, TensorViewMut::new(&mut output, SHAPE).unwrap()).unwrap();
        output
    };
    let exact = compute(None);
    for (config, allowed) in [(QuantizationConfig::int8(), 0.03), (QuantizationConfig::int4(), 0.3)] {
        let near = compute(Some(config));
        assert_ne!(near, exact);
        assert!(near.iter().zip(&exact).all(|(a, b)| (a - b).abs() < allowed));
    }
    // A rotated cache rotates the queries that are quantised on the way in.
    let keys = QuantizedTensor::new(&context, view, QuantizationScheme::int8().rotate(true)).unwrap();
    let mut output = vec![0.0f32; ELEMENTS];
    let attention = Attention::new().quantize(QuantizationConfig::int8());
    attention.forward(&context, view, keys.view().unwrap(), view, TensorViewMut::new(&mut output, SHAPE).unwrap()).unwrap();
    assert!(output.iter().zip(&exact).all(|(a, b)| (a - b).abs() < 0.03));
    let view_mut = TensorViewMut::new(&mut output, SHAPE).unwrap();
    let name = attention.kernel_name(&context, Operation::Forward, view, keys.view().unwrap(), view, view_mut.as_view()).unwrap();
    assert!(name.starts_with("attention_"), "{name}");
}

/// The memory of this process that is in use, in bytes.
#[cfg(target_os = "linux")]
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    4096 * status.split(' ').nth(1).unwrap().parse::<usize>().unwrap()
}

#[test]
#[cfg(target_os = "linux")]
fn what_is_dropped_is_freed() {
    let round = || {
        let context = MfaContext::builder().num_threads(1).build().unwrap();
        let mut buffers: Vec<MfaBuffer<f32>> = (0..4).map(|_| MfaBuffer::new(&context, 1 << 18).unwrap()).collect();
        for buffer in &mut buffers {
            buffer.fill(1.0); // touched, so that it counts
        }
        let mut slice = vec![0.0f32; 64];
        drop(MfaBuffer::from_slice(&context, &mut slice).unwrap());
        let view = buffers[0].view([1, 1, 1 << 12, 64]).unwrap();
        drop(QuantizedTensor::new(&context, view, QuantizationScheme::int8()).unwrap());
        assert!(MfaContext::builder().num_threads(1000).build().is_err());
    };
    for _ in 0..5 {
        round();
    }
    let before = resident();
    for _ in 0..100 {
        round(); // 4 MiB each
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 40 << 20, "{grown} bytes more than before");
}

#[test]
fn handles_are_destroyed_once() {
    let context = MfaContext::new().unwrap();
    let handle = context.as_ptr();
    drop(context);
    // SAFETY: the library recognises a handle that was destroyed.
    assert_eq!(unsafe { mfa::sys::mfa_destroy_context(handle) }, mfa::sys::MFA_ERROR_INVALID_CONTEXT);

    let context = MfaContext::new().unwrap();
    let buffer = MfaBuffer::<f32>::new(&context, 4).unwrap();
    let handle = buffer.handle();
    drop(buffer);
    // SAFETY: as above.
    assert_eq!(unsafe { mfa::sys::mfa_destroy_buffer(handle) }, mfa::sys::MFA_ERROR_INVALID_ARGUMENT);
}
