//! Decoding with a cache of keys and values in INT8 and INT4, never expanded to floats: cargo run --example quantized_kv

use mfa::{Alignment, Attention, MfaContext, QuantizationScheme, QuantizedTensor, TensorView, TensorViewMut};

fn main() -> mfa::Result<()> {
    let context = MfaContext::new()?;
    let (heads, kv_heads, tokens, channels) = (8, 2, 256, 64); // four query heads share a head of the cache
    let (query_shape, cache_shape) = ([1, heads, 1, channels], [1, kv_heads, tokens, channels]);
    let (query, key, value) = (noise(1, heads * channels), noise(2, kv_heads * tokens * channels), noise(3, kv_heads * tokens * channels));

    // The one query stands at the last key.
    let attention = Attention::new().causal(Alignment::LowerRight);
    let decode = |keys: TensorView<'_>, values: TensorView<'_>| {
        let mut output = vec![0.0f32; heads * channels];
        let view = TensorView::new(&query, query_shape)?;
        attention.forward(&context, view, keys, values, TensorViewMut::new(&mut output, query_shape)?)?;
        mfa::Result::Ok(output)
    };
    let exact = decode(TensorView::new(&key, cache_shape)?, TensorView::new(&value, cache_shape)?)?;
    println!("f32:  {:6} bytes", 2 * 4 * key.len());

    for (name, scheme) in [("int8", QuantizationScheme::int8()), ("int4", QuantizationScheme::int4())] {
        let keys = QuantizedTensor::new(&context, TensorView::new(&key, cache_shape)?, scheme.smooth(true))?;
        let values = QuantizedTensor::new(&context, TensorView::new(&value, cache_shape)?, scheme)?;
        let output = decode(keys.view()?, values.view()?)?;
        let square = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|number| number * number).sum::<f32>();
        let error = square(&mut output.iter().zip(&exact).map(|(a, b)| a - b)) / square(&mut exact.iter().copied());
        println!("{name}: {:6} bytes, relative error {:.2} %", keys.bytes() + values.bytes(), 100.0 * error.sqrt());
    }
    Ok(())
}

/// Numbers between -1 and 1 that look random.
fn noise(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed;
    let step = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(step).collect()
}
