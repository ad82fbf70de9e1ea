/* The firmware of an emulated PC that runs one program and nothing else, so that an emulator of whole machines tests instruction sets which
 * this processor lacks. Bochs loads it in place of a BIOS, and puts at 1 MiB an image which tools/check_kernels.py makes of a statically
 * linked Linux program: the three numbers below, the program, its stack.
 *
 * The program runs in 64-bit mode at the highest privilege, without interrupts, memory mapped as it is. System calls are a handful:
 * write (to the emulator's console, port E9), mprotect, brk, arch_prctl, exit; others fail, as the C library expects of a poor kernel. What the
 * console shows of the program stands between the characters STX and EOT, behind which comes '0' + its exit code. */

    .set IMAGE, 0x100000
    .set ENTRY, IMAGE            /* address of the program's first instruction */
    .set STACK, IMAGE + 8        /* its stack pointer */
    .set BREAK, IMAGE + 16       /* where free memory begins */
    .set TOUCHED, 0x4000000      /* more than the image takes */
    .set TABLES, 0x1000          /* of pages: four of the tables' levels, 4 KiB each */
    .set CONSOLE, 0xE9
    .set SHUTDOWN, 0x8900

    .text
    .code32
start_32:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss

    /* Bochs reads an image as one piece, but places the blocks of its memory in the order in which they are used first. */
    movl $IMAGE, %esi
1:  movl (%esi), %eax
    addl $0x1000, %esi
    cmpl $TOUCHED, %esi
    jne 1b

    /* Pages of 2 MiB: the first GiB, and the last one below 4 GiB, where this code is. */
    cld
    movl $TABLES, %edi
    xorl %eax, %eax
    movl $0x1000, %ecx
    rep stosl
    movl $(TABLES + 0x1007), TABLES
    movl $(TABLES + 0x2007), TABLES + 0x1000
    movl $(TABLES + 0x3007), TABLES + 0x1018
    movl $(TABLES + 0x2000), %edi
    movl $0x00000083, %eax
2:  movl %eax, (%edi)
    movl %eax, 0x1000(%edi)
    orl $0xC0000000, 0x1000(%edi)
    addl $8, %edi
    addl $0x200000, %eax
    cmpl $0x40000083, %eax
    jne 2b

    movl $0x406A0, %eax /* CR4: PAE, PGE, OSFXSR, OSXMMEXCPT, OSXSAVE */
    movl %eax, %cr4
    movl $TABLES, %eax
    movl %eax, %cr3
    movl $0xC0000080, %ecx /* EFER: LME, SCE */
    movl $0x101, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x80000033, %eax /* CR0: PG, NE, ET, MP, PE */
    movl %eax, %cr0
    ljmp $8, $start_64

    .code64
start_64:
    xorl %ecx, %ecx
    xorl %edx, %edx
    movl $0xE7, %eax /* XCR0: x87, SSE, AVX, AVX-512 */
    xsetbv
    movl $0xC0000081, %ecx /* STAR: system calls stay in segment 8 */
    xorl %eax, %eax
    movl $0x00080008, %edx
    wrmsr
    movl $0xC0000082, %ecx /* LSTAR: where they go */
    movl $system_call, %eax
    xorl %edx, %edx
    wrmsr
    movl $0xC0000084, %ecx /* SFMASK: flags stay */
    xorl %eax, %eax
    wrmsr
    movb $2, %al /* STX */
    outb %al, $CONSOLE
    movl $ENTRY, %ebx
    movq STACK - ENTRY(%rbx), %rsp
    movq (%rbx), %rax
    xorl %ebx, %ebx
    xorl %ecx, %ecx
    jmpq *%rax

/* rax is the number, rdi, rsi and rdx are arguments, rcx is where to go back. Nothing is pushed: the program may use memory below rsp. */
system_call:
    cmpl $1, %eax
    je write
    cmpl $10, %eax
    je mprotect
    cmpl $12, %eax
    je break
    cmpl $158, %eax
    je arch_prctl
    cmpl $60, %eax
    je exit
    cmpl $231, %eax /* exit_group */
    je exit
    movq $-38, %rax /* ENOSYS */
    jmpq *%rcx

write:
    movq %rcx, %r10
    movq %rdx, %r8
    movq %rdx, %rcx
    movl $CONSOLE, %edx
    rep outsb
    movq %r8, %rax
    jmpq *%r10

mprotect: /* nothing is protected */
    xorl %eax, %eax
    jmpq *%rcx

break:
    movl $BREAK, %eax
    testq %rdi, %rdi
    jz 1f
    movq %rdi, (%rax)
1:  movq (%rax), %rax
    jmpq *%rcx

arch_prctl:
    cmpq $0x1002, %rdi /* ARCH_SET_FS */
    jne 1f
    movq %rcx, %r10
    movq %rsi, %rax
    movq %rsi, %rdx
    shrq $32, %rdx
    movl $0xC0000100, %ecx /* FS_BASE */
    wrmsr
    xorl %eax, %eax
    jmpq *%r10
1:  movq $-22, %rax /* EINVAL */
    jmpq *%rcx

exit:
    movb $4, %al /* EOT */
    outb %al, $CONSOLE
    leal '0'(%rdi), %eax
    outb %al, $CONSOLE
    movl $SHUTDOWN, %edx
    leaq shutdown(%rip), %rsi
    movl $8, %ecx
    rep outsb
1:  hlt
    jmp 1b
shutdown:
    .ascii "Shutdown"

    .balign 8
descriptors:
    .quad 0
    .quad 0x00AF9B000000FFFF /* 8: code of 64 bits */
    .quad 0x00CF93000000FFFF /* 16: data */
    .quad 0x00CF9B000000FFFF /* 24: code of 32 bits */
descriptors_pointer:
    .word 31
    .long descriptors

    /* The first instruction that a processor executes is 16 bytes before the end of its 4 GiB. */
    .org 0xFF00
    .code16
start_16:
    cli
    data32 lgdt %cs:(descriptors_pointer - 0xFFFF0000)
    movl $0x11, %eax
    movl %eax, %cr0
    ljmpl $24, $start_32
    .org 0xFFF0
    jmp start_16
    .balign 16
