//! Causal attention of eight heads: cargo run --example first_attention

use mfa::{Alignment, Attention, MfaContext, TensorView, TensorViewMut};

fn main() -> mfa::Result<()> {
    let context = MfaContext::new()?;
    let info = context.info()?;
    println!("libmfa {} on {}, {} threads, {} kernels", mfa::version(), info.device_name, info.num_threads, info.instruction_set);

    let shape = [1, 8, 128, 64]; // batch, heads, tokens, channels
    let elements: usize = shape.iter().product();
    let wave = |step: f32| (0..elements).map(|index| (index as f32 * step).sin()).collect::<Vec<f32>>();
    let (query, key, value) = (wave(0.1), wave(0.2), wave(0.3));
    let mut output = vec![0.0f32; elements];
    let mut logsumexp = vec![0.0f32; 8 * 128];

    Attention::new().causal(Alignment::UpperLeft).forward_with_logsumexp(
        &context,
        TensorView::new(&query, shape)?,
        TensorView::new(&key, shape)?,
        TensorView::new(&value, shape)?,
        TensorViewMut::new(&mut output, shape)?,
        &mut logsumexp,
    )?;

    // The first query attends the first key alone, so that its output is the first value.
    println!("output {:?}, value {:?}", &output[..3], &value[..3]);
    println!("logsumexp of the last query: {:.4}", logsumexp[127]);

    // Whatever is wrong comes back as an error, in words.
    let view = TensorView::new(&query, shape)?;
    let narrow = TensorView::new(&key[..elements / 2], [1, 8, 128, 32])?;
    let refused = Attention::new().forward(&context, view, narrow, view, TensorViewMut::new(&mut output, shape)?);
    if let Err(error) = refused {
        println!("refused: {error}");
    }
    Ok(())
}
