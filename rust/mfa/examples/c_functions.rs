//! The C functions themselves, with contexts and buffers that free themselves: cargo run --example c_functions

use mfa::sys::{MFA_PRECISION_FP32, mfa_attention_forward};
use mfa::{MfaContext, create_buffers};

fn main() -> mfa::Result<()> {
    let (seq_len, head_dim) = (128, 64);
    let context = MfaContext::new()?;
    let mut buffers = create_buffers(&context, seq_len, head_dim)?;
    for (index, element) in buffers.query.iter_mut().enumerate() {
        *element = (index as f32).sin();
    }
    buffers.key.fill(0.5);
    buffers.value.fill(0.25);

    // SAFETY: the context and the buffers are alive, and each buffer has seq_len * head_dim elements.
    let status = unsafe {
        mfa_attention_forward(
            context.as_ptr(),
            buffers.query.as_void_ptr(),
            buffers.key.as_void_ptr(),
            buffers.value.as_void_ptr(),
            buffers.output.as_void_ptr(),
            1, // batch size
            seq_len as u32,
            seq_len as u32,
            1, // heads
            head_dim as u16,
            1.0 / (head_dim as f32).sqrt(),
            true, // causal
            MFA_PRECISION_FP32,
            MFA_PRECISION_FP32,
            MFA_PRECISION_FP32,
            false,
            false,
            false,
            false,
        )
    };
    context.check(status)?;

    println!("first output: {}", buffers.output[0]);
    Ok(())
} // the buffers and the context are freed here
