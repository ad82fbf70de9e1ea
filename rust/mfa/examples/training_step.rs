//! Gradient descent on keys and values, by the gradients of attention: cargo run --example training_step

use mfa::{Alignment, Attention, Gradients, MfaContext, TensorView, TensorViewMut};

fn main() -> mfa::Result<()> {
    let context = MfaContext::new()?;
    let shape = [1, 2, 16, 32]; // batch, heads, tokens, channels
    let elements: usize = shape.iter().product();
    let wave = |step: f32| (0..elements).map(|index| (index as f32 * step).sin()).collect::<Vec<f32>>();
    let (query, target) = (wave(0.1), wave(0.7));
    let (mut key, mut value) = (wave(0.2), wave(0.3));

    let attention = Attention::new().causal(Alignment::UpperLeft);
    for step in 0..5 {
        let (mut output, mut logsumexp) = (vec![0.0f32; elements], vec![0.0f32; 2 * 16]);
        let views = [&query, &key, &value].map(|operand| TensorView::new(operand, shape));
        let [query, keys, values] = views;
        let (query, keys, values) = (query?, keys?, values?);
        attention.forward_with_logsumexp(&context, query, keys, values, TensorViewMut::new(&mut output, shape)?, &mut logsumexp)?;

        // Half the mean of squared differences, and its gradient.
        let difference: Vec<f32> = output.iter().zip(&target).map(|(output, target)| output - target).collect();
        let loss: f32 = difference.iter().map(|number| number * number).sum::<f32>() / (2.0 * elements as f32);
        println!("step {step}: loss {loss:.5}");

        let (mut grad_key, mut grad_value) = (vec![0.0f32; elements], vec![0.0f32; elements]);
        let gradients = Gradients::new(TensorView::new(&difference, shape)?)
            .output(TensorView::new(&output, shape)?)
            .key(TensorViewMut::new(&mut grad_key, shape)?)
            .value(TensorViewMut::new(&mut grad_value, shape)?);
        attention.backward(&context, query, keys, values, &logsumexp, gradients)?;
        for (parameter, gradient) in key.iter_mut().zip(&grad_key).chain(value.iter_mut().zip(&grad_value)) {
            *parameter -= 0.02 * gradient;
        }
    }
    Ok(())
}
